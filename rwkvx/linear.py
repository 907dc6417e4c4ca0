"""The projections of every block.

Axes: C inputs.
"""

from torch import Tensor, nn

from rwkvx_kernels.linear import linear


class Linear(nn.Linear):
    """A product with a weight matrix, without bias, by the fastest routine at hand."""

    scale: nn.Parameter | None

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.register_parameter("scale", None)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., outputs]."""
        return linear(x, self.weight, self.scale)
