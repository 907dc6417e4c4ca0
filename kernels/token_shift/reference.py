"""The token shift by its equation, on any device."""

from collections.abc import Sequence

from torch import Tensor

from rwkvx_kernels.token_shift.common import before


def token_shift_reference(
    x: Tensor, previous: Tensor, mixes: Sequence[Tensor], cu_seqlens: Tensor | None
) -> list[Tensor]:
    """As `api.token_shift`."""
    return [x + (before(x, previous, cu_seqlens) - x) * mix for mix in mixes]
