"""The time mix between its projections, in plain torch around the recurrence."""

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from rwkvx_kernels.time_mix.common import TimeMixWeights, equations
from rwkvx_kernels.wkv7 import wkv7


def time_mix_torch(
    tokens: Sequence[Tensor],
    weights: TimeMixWeights,
    eps: float,
    state: Tensor,
    cu_seqlens: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """As `api.time_mix`; impl: of the recurrence."""
    recurrence = partial(wkv7, initial_state=state, cu_seqlens=cu_seqlens, impl=impl)
    return equations(tokens, weights, eps, recurrence)
