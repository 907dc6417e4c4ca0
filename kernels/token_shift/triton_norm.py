# mypy: allow-untyped-defs, allow-incomplete-defs
"""Layer norm and token shift in Triton as one operator of torch: one pass forward, one backward.

A program has all channels of some tokens, one after the other: what it made of a token is at hand
for the next one (forward), or for the one before (backward), and sums over tokens stay in
registers. Nothing is kept for the backward pass, which norms again.
Axes and names as in `triton_mixes.py`; `hat` is a token with mean 0 and variance 1.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvx_kernels.token_shift.common import Norm
from rwkvx_kernels.token_shift.options import TABLE
from rwkvx_kernels.token_shift.triton_mixes import mix, six, source, starts
from rwkvx_kernels.tools.operators import operator
from rwkvx_kernels.tools.sizes import ceil_div, next_power_of_2
from rwkvx_kernels.tools.triton_options import Options, options_for
from rwkvx_kernels.tools.triton_tiles import load, normalise, store

# Programs that a launch should have before one of them takes another token: some for each
# multiprocessor.
PROGRAMS = 512


@triton.jit
def _affine(b_hat, b_weight, b_bias, p_previous):
    """A normed token, rounded as where it is written down: it is what `previous` holds of it."""
    return (b_hat * b_weight + b_bias).to(p_previous.dtype.element_ty).to(tl.float32)


@triton.jit
def _choose(p_previous, b_inside, b_source, o_c, m_c, C: tl.constexpr):
    """What stands before a token: the normed token there, or that of `previous`."""
    b_given = load(p_previous, b_source.to(tl.int64) * C + o_c, m_c & (b_source >= 0))
    return tl.where(b_source >= 0, b_given, b_inside)


@triton.jit(do_not_specialize=["tokens", "rows", "count"])
def _norm_forward_kernel(
    p_x, p_previous, p_starts, p_weight, p_bias,
    p_mix0, p_mix1, p_mix2, p_mix3, p_mix4, p_mix5,
    p_out0, p_out1, p_out2, p_out3, p_out4, p_out5,
    eps, tokens, rows, count, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_first = tl.program_id(0).to(tl.int64) * count
    o_c = tl.arange(0, BLOCK)[None, :]
    m_c = o_c < C
    b_weight, b_bias = load(p_weight, o_c, m_c), load(p_bias, o_c, m_c)
    b_hat, _ = normalise(load(p_x, tl.maximum(i_first - 1, 0) * C + o_c, m_c), m_c, eps, C)
    b_before = _affine(b_hat, b_weight, b_bias, p_previous)
    for i_step in range(tl.minimum(count, rows - i_first).to(tl.int32)):
        i_row = i_first + i_step + tl.arange(0, 1)[:, None]
        o_x = i_row * C + o_c
        b_hat, _ = normalise(load(p_x, o_x, m_c), m_c, eps, C)
        b_now = _affine(b_hat, b_weight, b_bias, p_previous)
        b_source = source(i_row, p_starts, tokens)
        b_delta = _choose(p_previous, b_before, b_source, o_c, m_c, C) - b_now
        mix(p_mix0, p_out0, b_now, b_delta, o_c, o_x, m_c, m_c)
        mix(p_mix1, p_out1, b_now, b_delta, o_c, o_x, m_c, m_c)
        mix(p_mix2, p_out2, b_now, b_delta, o_c, o_x, m_c, m_c)
        mix(p_mix3, p_out3, b_now, b_delta, o_c, o_x, m_c, m_c)
        mix(p_mix4, p_out4, b_now, b_delta, o_c, o_x, m_c, m_c)
        mix(p_mix5, p_out5, b_now, b_delta, o_c, o_x, m_c, m_c)
        b_before = b_now


@triton.jit
def _share(p_mix, p_dout, b_dbefore, o_c, o_x, m_c, m_x):
    """Add what the gradient of a mix says of the token before."""
    if p_mix is not None:
        b_dbefore += load(p_dout, o_x, m_x) * load(p_mix, o_c, m_c)
    return b_dbefore


@triton.jit
def _unmix(p_mix, p_dout, b_dnow, b_dbefore, b_dmix, b_delta, o_c, o_x, m_c):
    """Add to the gradients of a token, of the one before it, and of the mix."""
    if p_mix is not None:
        b_dout = load(p_dout, o_x, m_c)
        b_part = b_dout * load(p_mix, o_c, m_c)
        b_dnow += b_dout - b_part
        b_dbefore += b_part
        b_dmix += b_dout * b_delta
    return b_dnow, b_dbefore, b_dmix


@triton.jit
def _write(p_mix, p_partial, b_dmix, o_c, m_c):
    if p_mix is not None:
        tl.store(p_partial + o_c, b_dmix, mask=m_c)


@triton.jit(do_not_specialize=["tokens", "rows", "count"])
def _norm_backward_kernel(
    p_x, p_previous, p_starts, p_weight, p_bias,
    p_mix0, p_mix1, p_mix2, p_mix3, p_mix4, p_mix5,
    p_dout0, p_dout1, p_dout2, p_dout3, p_dout4, p_dout5,
    p_dx, p_dprevious, p_partial,
    eps, tokens, rows, count, M: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_first = tl.program_id(0).to(tl.int64) * count
    i_last = tl.minimum(i_first + count, rows) - 1
    o_c = tl.arange(0, BLOCK)[None, :]
    m_c = o_c < C
    b_weight, b_bias = load(p_weight, o_c, m_c), load(p_bias, o_c, m_c)
    zeros = tl.zeros((1, BLOCK), tl.float32)
    b_dmix0, b_dmix1, b_dmix2, b_dmix3, b_dmix4, b_dmix5 = zeros, zeros, zeros, zeros, zeros, zeros
    b_dweight, b_dbias = zeros, zeros
    # The token after the last one of this program adds to the gradient of that.
    i_next = i_last + 1 + tl.arange(0, 1)[:, None]
    m_next, i_next = m_c & (i_next < rows), tl.minimum(i_next, rows - 1)
    m_next = m_next & (source(i_next, p_starts, tokens) < 0)
    o_next, b_dnext = i_next * C + o_c, zeros
    b_dnext = _share(p_mix0, p_dout0, b_dnext, o_c, o_next, m_c, m_next)
    b_dnext = _share(p_mix1, p_dout1, b_dnext, o_c, o_next, m_c, m_next)
    b_dnext = _share(p_mix2, p_dout2, b_dnext, o_c, o_next, m_c, m_next)
    b_dnext = _share(p_mix3, p_dout3, b_dnext, o_c, o_next, m_c, m_next)
    b_dnext = _share(p_mix4, p_dout4, b_dnext, o_c, o_next, m_c, m_next)
    b_dnext = _share(p_mix5, p_dout5, b_dnext, o_c, o_next, m_c, m_next)
    b_hat, b_inverse = normalise(load(p_x, i_last * C + o_c, m_c), m_c, eps, C)
    for i_step in range((i_last + 1 - i_first).to(tl.int32)):
        i_row = i_last - i_step + tl.arange(0, 1)[:, None]
        o_x = i_row * C + o_c
        b_x = load(p_x, tl.maximum(i_row - 1, 0) * C + o_c, m_c)
        b_hat_before, b_inverse_before = normalise(b_x, m_c, eps, C)
        b_before = _affine(b_hat_before, b_weight, b_bias, p_previous)
        b_source = source(i_row, p_starts, tokens)
        b_delta = _choose(p_previous, b_before, b_source, o_c, m_c, C)
        b_delta -= _affine(b_hat, b_weight, b_bias, p_previous)
        b_dn, b_db = b_dnext, zeros
        b_dn, b_db, b_dmix0 = _unmix(p_mix0, p_dout0, b_dn, b_db, b_dmix0, b_delta, o_c, o_x, m_c)
        b_dn, b_db, b_dmix1 = _unmix(p_mix1, p_dout1, b_dn, b_db, b_dmix1, b_delta, o_c, o_x, m_c)
        b_dn, b_db, b_dmix2 = _unmix(p_mix2, p_dout2, b_dn, b_db, b_dmix2, b_delta, o_c, o_x, m_c)
        b_dn, b_db, b_dmix3 = _unmix(p_mix3, p_dout3, b_dn, b_db, b_dmix3, b_delta, o_c, o_x, m_c)
        b_dn, b_db, b_dmix4 = _unmix(p_mix4, p_dout4, b_dn, b_db, b_dmix4, b_delta, o_c, o_x, m_c)
        b_dn, b_db, b_dmix5 = _unmix(p_mix5, p_dout5, b_dn, b_db, b_dmix5, b_delta, o_c, o_x, m_c)
        store(p_dprevious, b_source.to(tl.int64) * C + o_c, b_db, m_c & (b_source >= 0))
        b_dnext = tl.where(b_source >= 0, 0.0, b_db)
        b_dweight += b_dn * b_hat
        b_dbias += b_dn
        b_dhat = b_dn * b_weight
        b_mean = tl.sum(b_dhat, axis=1, keep_dims=True) / C
        b_along = tl.sum(b_dhat * b_hat, axis=1, keep_dims=True) / C
        store(p_dx, o_x, (b_dhat - b_mean - b_hat * b_along) * b_inverse, m_c)
        b_hat, b_inverse = b_hat_before, b_inverse_before
    p_partial += tl.program_id(0).to(tl.int64) * ((M + 2) * C)
    tl.store(p_partial + o_c, b_dweight, mask=m_c)
    tl.store(p_partial + C + o_c, b_dbias, mask=m_c)
    _write(p_mix0, p_partial + 2 * C, b_dmix0, o_c, m_c)
    _write(p_mix1, p_partial + 3 * C, b_dmix1, o_c, m_c)
    _write(p_mix2, p_partial + 4 * C, b_dmix2, o_c, m_c)
    _write(p_mix3, p_partial + 5 * C, b_dmix3, o_c, m_c)
    _write(p_mix4, p_partial + 6 * C, b_dmix4, o_c, m_c)
    _write(p_mix5, p_partial + 7 * C, b_dmix5, o_c, m_c)


def _launch(stage: str, x: Tensor) -> tuple[int, int, Options]:
    """Tokens of a program, programs, and launch options of a stage."""
    rows = x.shape[0] * x.shape[1]
    options = options_for(TABLE, stage, x.dtype, x.shape[2], x.device)
    count = max(1, min(options.rows, ceil_div(rows, PROGRAMS)))
    return count, ceil_div(rows, count), options


def forward(
    x: Tensor,
    previous: Tensor,
    norm: Norm,
    mixes: list[Tensor],
    cu_seqlens: Tensor | None,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Launch: the normed and mixed tokens [B, T, C], in `dtype`; `previous` is normed, and of the
    dtype that normed tokens are rounded to."""
    batch, tokens, width = x.shape
    out = [torch.empty_like(x, dtype=dtype) for _ in mixes]
    count, programs, options = _launch("norm_forward", x)
    if x.numel():
        _norm_forward_kernel[(programs,)](
            *(x, previous, starts(tokens, cu_seqlens), norm.weight, norm.bias),
            *(*six(mixes), *six(out), norm.eps, tokens, batch * tokens, count),
            C=width,
            BLOCK=next_power_of_2(width),
            **options.launch,
        )
    return out


def backward(
    x: Tensor,
    previous: Tensor,
    norm: Norm,
    mixes: list[Tensor],
    cu_seqlens: Tensor | None,
    dout: list[Tensor],
) -> list[Tensor]:
    """Launch: gradients of x, previous, the norm's weight and bias, and of every mix."""
    batch, tokens, width = x.shape
    dx, dprevious = torch.empty_like(x), torch.zeros_like(previous)
    count, programs, options = _launch("norm_backward", x)
    partial = x.new_empty(programs, 2 + len(mixes), width, dtype=torch.float32)
    if x.numel():
        _norm_backward_kernel[(programs,)](
            *(x, previous, starts(tokens, cu_seqlens), norm.weight, norm.bias),
            *(*six(mixes), *six(dout), dx, dprevious, partial),
            *(norm.eps, tokens, batch * tokens, count),
            M=len(mixes),
            C=width,
            BLOCK=next_power_of_2(width),
            **options.launch,
        )
    sums, like = partial.sum(dim=0), (norm.weight, norm.bias, *mixes)
    return [dx, dprevious, *(row.to(x.dtype, copy=True) for row, x in zip(sums, like, strict=True))]


def _fake(
    x: Tensor, _: Tensor, __: Tensor, ___: Tensor, mixes: list[Tensor], ____: Any, eps: float,
    dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    return [torch.empty_like(x, dtype=dtype) for _ in mixes]


def _gradients(grads: list[Tensor], _: list[Tensor], args: tuple[Any, ...]) -> list[Tensor]:
    x, previous, weight, bias, mixes, cu_seqlens, eps, _ = args
    return backward(x, previous, Norm(weight, bias, eps), mixes, cu_seqlens, grads)


@operator("norm_token_shift", _fake, _gradients)
def norm_token_shift(
    x: Tensor,
    previous: Tensor,
    weight: Tensor,
    bias: Tensor,
    mixes: list[Tensor],
    cu_seqlens: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> list[Tensor]:
    """As `forward`; tensors are contiguous."""
    return forward(x, previous, Norm(weight, bias, eps), mixes, cu_seqlens, dtype)
