"""What stands before each token.

Axes: B batch, T time, C width.
"""

import torch
from torch import Tensor


def before(x_BTC: Tensor, previous: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The token before each token: [B, T, C]."""
    if cu_seqlens is None:
        first = previous.unsqueeze(1)
        return first if x_BTC.shape[1] == 1 else torch.cat([first, x_BTC[:, :-1]], dim=1)
    # An empty sequence starts where the next one does: its token goes behind the end, and off.
    shifted = torch.cat([x_BTC[:, :1], x_BTC], dim=1)
    first = cu_seqlens[:-1].where(cu_seqlens.diff() > 0, x_BTC.shape[1])
    return shifted.index_copy(1, first, previous.unsqueeze(0))[:, :-1]
