"""The public token shift: checks its arguments and chooses an implementation."""

from collections.abc import Sequence

from torch import Tensor

from rwkvx_kernels.dispatch import (
    Choice,
    Facts,
    autocast_dtype,
    check_packed,
    decide,
    facts_of,
    remembered,
    triton_lacks,
)
from rwkvx_kernels.token_shift.reference import token_shift_reference
from rwkvx_kernels.token_shift.torch_form import token_shift_torch

MOST_MIXES = 6


@remembered
def choose(facts: Facts, impl: str = "auto") -> Choice:
    """Which implementation `token_shift` runs."""
    triton = triton_lacks(facts)
    if not triton:
        from rwkvx_kernels.token_shift.options import STAGES, TABLE
        from rwkvx_kernels.tools.triton_options import missing  # Triton may be missing

        triton = missing(TABLE, STAGES, facts.dtype, 1, facts.device)
    return decide(impl, facts, {"triton": triton, "torch": "", "reference": ""})


def token_shift(
    x: Tensor,
    previous: Tensor,
    mixes: Sequence[Tensor],
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
) -> list[Tensor]:
    """`x + (before(x) - x) mix` for every mix (arXiv 2503.14456, eq. 3), differentiable.

    Args:
        x: [B, T, C]. `before` is the token before each token.
        previous: [B, C], stands before the first token; with `cu_seqlens`, [sequences, C].
        mixes: one to six of [C].
        cu_seqlens: [sequences + 1] integer offsets of sequences packed along T, batch size 1. On a
            GPU they are not looked at, which would wait for it.
        impl: "auto", "reference", "torch" or "triton".

    Returns:
        for every mix [B, T, C] in the dtype of x; from Triton, in the dtype of autocast where that
        is enabled: what reads it are products.

    Raises:
        ValueError: shapes that do not fit together.
        UnsupportedError: Triton kernels for float64 or without a GPU.
    """
    if x.dim() != 3 or any(mix.shape != x.shape[-1:] for mix in mixes):
        shapes = [list(mix.shape) for mix in mixes]
        raise ValueError(f"x must be [B, T, C] and mixes [C], got {list(x.shape)} and {shapes}")
    if not 1 <= len(mixes) <= MOST_MIXES:
        raise ValueError(f"one to {MOST_MIXES} mixes, got {len(mixes)}")
    rows = len(x) if cu_seqlens is None else check_packed(cu_seqlens, len(x))
    if previous.shape != (rows, x.shape[-1]):
        raise ValueError(f"previous must be {[rows, x.shape[-1]]}, got {list(previous.shape)}")
    chosen = choose(facts_of(x), impl).impl
    if chosen != "triton":
        form = token_shift_torch if chosen == "torch" else token_shift_reference
        return form(x, previous, mixes, cu_seqlens)
    from rwkvx_kernels.token_shift.triton_mixes import token_shift as operator  # may be missing

    dtype, previous = autocast_dtype(x), previous.to(x.dtype).contiguous()
    return operator(x.contiguous(), previous, [m.contiguous() for m in mixes], cu_seqlens, dtype)
