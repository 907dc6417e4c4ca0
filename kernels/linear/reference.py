"""Products with weights by their equations, in any float dtype on any device.

Axes: I inputs, O outputs, R rank.
"""

from torch import Tensor

from rwkvx_kernels.linear.common import ACTIVATIONS


def linear_reference(x: Tensor, weight_OI: Tensor, scale_O: Tensor | None = None) -> Tensor:
    """As `api.linear`."""
    y = x @ weight_OI.to(x.dtype).T
    return y if scale_O is None else y * scale_O.to(x.dtype)


def low_rank_reference(x: Tensor, down_IR: Tensor, up_RO: Tensor, activation: str) -> Tensor:
    """As `api.low_rank`."""
    return ACTIVATIONS[activation](x @ down_IR) @ up_RO
