"""The time mix between its projections, equation by equation, the recurrence token by token."""

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from rwkvx_kernels.time_mix.common import TimeMixWeights, equations
from rwkvx_kernels.wkv7 import wkv7


def time_mix_reference(
    tokens: Sequence[Tensor],
    weights: TimeMixWeights,
    eps: float,
    state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `api.time_mix`."""
    recurrence = partial(wkv7, initial_state=state, cu_seqlens=cu_seqlens, impl="reference")
    return equations(tokens, weights, eps, recurrence)
