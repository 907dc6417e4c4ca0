"""What all kinds of block share: projections, the channel mix, the last token of a sequence.

Axes: B batch, T time, C width.
"""

import torch
from torch import Tensor, nn

from rwkvx.sequence import SequenceParallel
from rwkvx_kernels.channel_mix import squared_relu
from rwkvx_kernels.linear import linear
from rwkvx_kernels.token_shift import token_shift

# What a model's `impl` means for operations that do not come in all of them: torch's products are
# faster than Triton's would be, and compiled loops would gain nothing between products.
PRODUCTS = {"triton": "torch"}
ELEMENTWISE = {"compiled": "torch"}


class Linear(nn.Linear):
    """A product with a weight matrix, without bias; an int8 weight has a scale for each row."""

    scale: nn.Parameter | None

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.register_parameter("scale", None)
        self.impl = "auto"

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs]."""
        return linear(x, self.weight, self.scale, PRODUCTS.get(self.impl, self.impl))


class ChannelMix(nn.Module):
    """W_v relu(W_k (x + (shift(x) - x) x_k))^2 (arXiv 2503.14456, eq. 21-22)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.x_k = nn.Parameter(torch.empty(width))
        self.key = Linear(width, inner)
        self.value = Linear(inner, width)
        self.impl = "auto"
        self.sequence: SequenceParallel | None = None  # who reads the other parts of a sequence

    def forward(
        self, x: Tensor, shift: Tensor, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x [B, T, C], normalised, and the last input before it [B, C] -> output, new shift."""
        impl = ELEMENTWISE.get(self.impl, self.impl)
        if self.sequence is not None:
            shift = self.sequence.before(x[:, -1], shift)
        (mixed,) = token_shift(x, shift, [self.x_k], cu_seqlens, impl)
        hidden = squared_relu(self.key(mixed), impl, overwrite=True)
        return self.value(hidden), last_token(x, shift, cu_seqlens)


def last_token(x_BTC: Tensor, previous: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The last token of each sequence, what was before it of an empty one: [B or sequences, C]."""
    if cu_seqlens is None:  # a copy, or the state would hold the whole segment
        return x_BTC[:, -1] if x_BTC.shape[1] == 1 else x_BTC[:, -1].clone()
    some = cu_seqlens.diff() > 0
    return torch.where(some.unsqueeze(1), x_BTC[0, cu_seqlens[1:] - 1], previous)
