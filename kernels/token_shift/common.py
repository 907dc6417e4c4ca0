"""What stands before each token, and the layer norm of tokens that are mixed.

Axes: B batch, T time, C width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_MIXES = 6  # of one call


class Norm(NamedTuple):
    """A layer norm over channels (arXiv 1607.06450): weight and bias [C], and what is added to the
    variance."""

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., C], normalised."""
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)

    @staticmethod
    def dtype(x: Tensor) -> torch.dtype:
        """Of what torch makes of `x`: autocast on a GPU gives layer norms in float32."""
        wide = x.device.type == "cuda" and torch.is_autocast_enabled("cuda")
        return torch.float32 if wide else x.dtype


def before(x_BTC: Tensor, previous: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The token before each token: [B, T, C]."""
    if cu_seqlens is None:
        first = previous.unsqueeze(1)
        return first if x_BTC.shape[1] == 1 else torch.cat([first, x_BTC[:, :-1]], dim=1)
    # An empty sequence starts where the next one does: its token goes behind the end, and off.
    shifted = torch.cat([x_BTC[:, :1], x_BTC], dim=1)
    first = cu_seqlens[:-1].where(cu_seqlens.diff() > 0, x_BTC.shape[1])
    return shifted.index_copy(1, first, previous.unsqueeze(0))[:, :-1]
