"""The public token shift: checks its arguments and chooses an implementation."""

from collections.abc import Sequence

from torch import Tensor

from rwkvx_kernels.dispatch import autocast_dtype, check_packed, resolve_impl
from rwkvx_kernels.token_shift.reference import token_shift_reference

AVAILABLE = ("reference", "cpu", "triton")
MOST_MIXES = 6


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
        impl: "auto", "reference", "cpu" (both plain torch) or "triton".

    Returns:
        for every mix [B, T, C] in the dtype of x; from Triton, in the dtype of autocast where that
        is enabled: what reads it are products.

    Raises:
        ValueError: shapes that do not fit together; Triton kernels for float64 or without a GPU.
    """
    if x.dim() != 3 or any(mix.shape != x.shape[-1:] for mix in mixes):
        shapes = [list(mix.shape) for mix in mixes]
        raise ValueError(f"x must be [B, T, C] and mixes [C], got {list(x.shape)} and {shapes}")
    if not 1 <= len(mixes) <= MOST_MIXES:
        raise ValueError(f"one to {MOST_MIXES} mixes, got {len(mixes)}")
    rows = len(x) if cu_seqlens is None else check_packed(cu_seqlens, len(x))
    if previous.shape != (rows, x.shape[-1]):
        raise ValueError(f"previous must be {[rows, x.shape[-1]]}, got {list(previous.shape)}")
    if resolve_impl(impl, x.device, AVAILABLE, x.dtype) != "triton":
        return token_shift_reference(x, previous, mixes, cu_seqlens)
    from rwkvx_kernels.token_shift.triton_ops import (
        token_shift as operator,  # Triton may be missing
    )

    dtype = autocast_dtype(x)
    shifted: list[Tensor] = operator(
        x.contiguous(), previous.to(x.dtype).contiguous(), list(mixes), cu_seqlens, dtype
    )
    return shifted
