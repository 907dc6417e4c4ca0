"""The token shift in plain torch, on any device: one difference for all mixes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rwkvx_kernels.token_shift.common import before


def token_shift_torch(
    x: Tensor, previous: Tensor, mixes: Sequence[Tensor], cu_seqlens: Tensor | None
) -> list[Tensor]:
    """As `api.token_shift`."""
    shifted = before(x, previous, cu_seqlens)
    if len(mixes) == 1:
        return [torch.lerp(x, shifted, mixes[0])]
    change = shifted - x
    return [torch.addcmul(x, change, mix) for mix in mixes]
