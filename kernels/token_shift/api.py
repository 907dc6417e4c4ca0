"""The public token shift: checks its arguments and chooses an implementation."""

from collections.abc import Sequence

from torch import Tensor

from rwkvx_kernels.dispatch import (
    Choice,
    Facts,
    autocast_dtype,
    check_packed,
    decide_elementwise,
    facts_of,
    remembered,
    triton_lacks,
)
from rwkvx_kernels.token_shift.common import MOST_MIXES, Norm
from rwkvx_kernels.token_shift.reference import token_shift_reference
from rwkvx_kernels.token_shift.torch_form import token_shift_torch


@remembered
def choose(facts: Facts, impl: str = "auto") -> Choice:
    """Which implementation `token_shift` runs."""
    triton = triton_lacks(facts)
    if not triton:
        from rwkvx_kernels.token_shift.options import STAGES, TABLE
        from rwkvx_kernels.tools.triton_options import missing  # Triton may be missing

        triton = missing(TABLE, STAGES, facts.dtype, 1, facts.device)
    return decide_elementwise(impl, facts, triton)


def fuses_norm(x: Tensor, impl: str = "auto") -> bool:
    """Whether `token_shift` of `x` does a layer norm by the way: it then costs no pass of its own,
    and the normed tokens exist nowhere."""
    form = choose(facts_of(x), impl).impl
    if form != "triton":
        return form == "compiled"
    from rwkvx_kernels.token_shift.options import NORM_STAGES, TABLE
    from rwkvx_kernels.tools.triton_options import missing

    return not missing(TABLE, NORM_STAGES, x.dtype, x.shape[-1], x.device)


def token_shift(
    x: Tensor,
    previous: Tensor,
    mixes: Sequence[Tensor],
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
    norm: Norm | None = None,
) -> list[Tensor]:
    """`x + (before(x) - x) mix` for every mix (arXiv 2503.14456, eq. 3), differentiable.

    Args:
        x: [B, T, C]. `before` is the token before each token.
        previous: [B, C], stands before the first token; with `cu_seqlens`, [sequences, C].
        mixes: one to six of [C].
        cu_seqlens: [sequences + 1] integer offsets of sequences packed along T, batch size 1. On a
            GPU they are not looked at, which would wait for it.
        impl: "auto", "reference", "torch", "compiled" (Numba, on a CPU; traced by `torch.compile`,
            it is torch's form) or "triton".
        norm: weight [C], bias [C] and eps of a layer norm that `x` goes through first; `previous`
            is normed already.

    Returns:
        for every mix [B, T, C] in the dtype of x; compiled or from Triton, in the dtype of autocast
        where that is enabled: what reads it are products.

    Raises:
        ValueError: shapes that do not fit together.
        UnsupportedError: Triton kernels for float64 or without a GPU.
    """
    _check_shapes(x, previous, mixes, cu_seqlens, norm)
    form = choose(facts_of(x), impl).impl
    if norm is not None and not fuses_norm(x, impl):
        x, norm = norm(x), None
    if form == "torch":
        return token_shift_torch(x, previous, mixes, cu_seqlens)
    if form == "reference":
        return token_shift_reference(x, previous, mixes, cu_seqlens)
    if form == "compiled":
        from rwkvx_kernels.token_shift.numba_mixes import token_shift_compiled  # half a second

        return token_shift_compiled(x, previous, list(mixes), cu_seqlens, norm, autocast_dtype(x))
    dtype, x, mixes = autocast_dtype(x), x.contiguous(), [m.contiguous() for m in mixes]
    previous = previous.to(x.dtype if norm is None else norm.dtype(x)).contiguous()
    if norm is None:
        from rwkvx_kernels.token_shift.triton_mixes import token_shift as plain  # may be missing

        return plain(x, previous, mixes, cu_seqlens, dtype)
    from rwkvx_kernels.token_shift.triton_norm import norm_token_shift

    weight, bias = norm.weight.contiguous(), norm.bias.contiguous()
    return norm_token_shift(x, previous, weight, bias, mixes, cu_seqlens, norm.eps, dtype)


def _check_shapes(
    x: Tensor,
    previous: Tensor,
    mixes: Sequence[Tensor],
    cu_seqlens: Tensor | None,
    norm: Norm | None,
) -> None:
    if x.dim() != 3 or any(mix.shape != x.shape[-1:] for mix in mixes):
        shapes = [list(mix.shape) for mix in mixes]
        raise ValueError(f"x must be [B, T, C] and mixes [C], got {list(x.shape)} and {shapes}")
    if not 1 <= len(mixes) <= MOST_MIXES:
        raise ValueError(f"one to {MOST_MIXES} mixes, got {len(mixes)}")
    rows = len(x) if cu_seqlens is None else check_packed(cu_seqlens, len(x))
    if previous.shape != (rows, x.shape[-1]):
        raise ValueError(f"previous must be {[rows, x.shape[-1]]}, got {list(previous.shape)}")
    if norm is not None and {norm.weight.shape, norm.bias.shape} != {x.shape[-1:]}:
        shapes = [list(norm.weight.shape), list(norm.bias.shape)]
        raise ValueError(f"weight and bias of the norm must be {list(x.shape[-1:])}, got {shapes}")
