# mypy: allow-untyped-defs, allow-incomplete-defs
"""The token shift in Triton as an operator of torch, forward and backward one pass each.

Axes: S sequences, T time, C width. Names: i_ index, p_ pointer, b_ tile in registers, o_ offset,
m_ mask. A program has ROWS tokens and COLUMNS channels; pointers of mixes that are not there are
None.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvx_kernels.token_shift.common import MOST_MIXES
from rwkvx_kernels.token_shift.options import TABLE
from rwkvx_kernels.tools.operators import operator
from rwkvx_kernels.tools.sizes import ceil_div
from rwkvx_kernels.tools.triton_options import options_for
from rwkvx_kernels.tools.triton_tiles import load, store


@triton.jit
def source(i_row, p_starts, tokens):
    """Row of `previous` that stands before a token, or -1 for the token before it."""
    if p_starts is None:
        b_source = tl.where(i_row % tokens == 0, (i_row // tokens).to(tl.int32), -1)
    else:
        b_source = tl.load(p_starts + i_row)
    return b_source


@triton.jit
def _before(p_x, p_previous, i_row, o_c, b_source, m_x, C: tl.constexpr):
    b_inside = load(p_x, (i_row - 1) * C + o_c, m_x & (b_source < 0))
    return b_inside + load(p_previous, b_source.to(tl.int64) * C + o_c, m_x & (b_source >= 0))


@triton.jit
def mix(p_mix, p_out, b_x, b_delta, o_c, o_x, m_c, m_x):
    if p_mix is not None:
        store(p_out, o_x, b_x + b_delta * load(p_mix, o_c, m_c), m_x)


@triton.jit(do_not_specialize=["tokens", "rows"])
def _forward_kernel(
    p_x, p_previous, p_starts,
    p_mix0, p_mix1, p_mix2, p_mix3, p_mix4, p_mix5,
    p_out0, p_out1, p_out2, p_out3, p_out4, p_out5,
    tokens, rows, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    i_part = tl.program_id(0) // tl.cdiv(C, COLUMNS)
    i_row = i_part.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    o_c = (tl.program_id(0) % tl.cdiv(C, COLUMNS)) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    m_row, m_c = i_row < rows, o_c < C
    i_row = tl.minimum(i_row, rows - 1)  # `starts` ends there
    o_x, m_x = i_row * C + o_c, m_row & m_c
    b_source = source(i_row, p_starts, tokens)
    b_x = load(p_x, o_x, m_x)
    b_delta = _before(p_x, p_previous, i_row, o_c, b_source, m_x, C) - b_x
    mix(p_mix0, p_out0, b_x, b_delta, o_c, o_x, m_c, m_x)
    mix(p_mix1, p_out1, b_x, b_delta, o_c, o_x, m_c, m_x)
    mix(p_mix2, p_out2, b_x, b_delta, o_c, o_x, m_c, m_x)
    mix(p_mix3, p_out3, b_x, b_delta, o_c, o_x, m_c, m_x)
    mix(p_mix4, p_out4, b_x, b_delta, o_c, o_x, m_c, m_x)
    mix(p_mix5, p_out5, b_x, b_delta, o_c, o_x, m_c, m_x)


@triton.jit
def _unmix(p_mix, p_dout, p_partial, b_dx, b_dfirst, b_delta, o, m, C: tl.constexpr):
    """Add to the gradients of a token and of what stood before it; those of the mix, summed."""
    if p_mix is not None:
        o_c, o_x = o
        m_c, m_x, m_next = m
        b_mix, b_dout = load(p_mix, o_c, m_c), load(p_dout, o_x, m_x)
        b_next = load(p_dout, o_x + C, m_next)
        b_dx += b_dout + (b_next - b_dout) * b_mix
        b_dfirst += b_dout * b_mix
        b_dmix = tl.sum(b_dout * b_delta, axis=0)[None, :]
        tl.store(p_partial + o_c, b_dmix, mask=m_c)
    return b_dx, b_dfirst


@triton.jit(do_not_specialize=["tokens", "rows"])
def _backward_kernel(
    p_x, p_previous, p_starts,
    p_mix0, p_mix1, p_mix2, p_mix3, p_mix4, p_mix5,
    p_dout0, p_dout1, p_dout2, p_dout3, p_dout4, p_dout5,
    p_dx, p_dprevious, p_partial,
    tokens, rows, M: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    i_part = tl.program_id(0) // tl.cdiv(C, COLUMNS)
    i_row = i_part.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    o_c = (tl.program_id(0) % tl.cdiv(C, COLUMNS)) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    m_row, m_c = i_row < rows, o_c < C
    m_next = i_row + 1 < rows
    i_row = tl.minimum(i_row, rows - 1)
    i_next = tl.minimum(i_row + 1, rows - 1)
    o_x, m_x = i_row * C + o_c, m_row & m_c
    b_source = source(i_row, p_starts, tokens)
    m_next = m_next & m_c & (source(i_next, p_starts, tokens) < 0)
    b_x = load(p_x, o_x, m_x)
    b_delta = _before(p_x, p_previous, i_row, o_c, b_source, m_x, C) - b_x
    b_dx = tl.zeros((ROWS, COLUMNS), tl.float32)
    b_df = tl.zeros((ROWS, COLUMNS), tl.float32)
    p_p = p_partial + i_part.to(tl.int64) * (M * C)
    o, m = (o_c, o_x), (m_c, m_x, m_next)
    b_dx, b_df = _unmix(p_mix0, p_dout0, p_p, b_dx, b_df, b_delta, o, m, C)
    b_dx, b_df = _unmix(p_mix1, p_dout1, p_p + C, b_dx, b_df, b_delta, o, m, C)
    b_dx, b_df = _unmix(p_mix2, p_dout2, p_p + 2 * C, b_dx, b_df, b_delta, o, m, C)
    b_dx, b_df = _unmix(p_mix3, p_dout3, p_p + 3 * C, b_dx, b_df, b_delta, o, m, C)
    b_dx, b_df = _unmix(p_mix4, p_dout4, p_p + 4 * C, b_dx, b_df, b_delta, o, m, C)
    b_dx, b_df = _unmix(p_mix5, p_dout5, p_p + 5 * C, b_dx, b_df, b_delta, o, m, C)
    store(p_dx, o_x, b_dx, m_x)
    store(p_dprevious, b_source.to(tl.int64) * C + o_c, b_df, m_x & (b_source >= 0))


def starts(tokens: int, cu_seqlens: Tensor | None) -> Tensor | None:
    """[T] int32: the sequence that starts at a token, -1 where none does."""
    if cu_seqlens is None:
        return None
    found = torch.full((tokens + 1,), -1, dtype=torch.int32, device=cu_seqlens.device)
    rows = torch.arange(len(cu_seqlens) - 1, dtype=torch.int32, device=cu_seqlens.device)
    # Where several start, all but the last are empty; at the end, all.
    return found.scatter_reduce(0, cu_seqlens[:-1].long(), rows, "amax")[:tokens].contiguous()


def six(tensors: list[Tensor]) -> list[Tensor | None]:
    return [*tensors, *[None] * (MOST_MIXES - len(tensors))]


def forward(
    x: Tensor, previous: Tensor, mixes: list[Tensor], cu_seqlens: Tensor | None, dtype: torch.dtype
) -> list[Tensor]:
    """Launch: the mixed tokens [B, T, C], in `dtype`."""
    batch, tokens, width = x.shape
    out = [torch.empty_like(x, dtype=dtype) for _ in mixes]
    rows, options = batch * tokens, options_for(TABLE, "forward", x.dtype, width, x.device)
    if x.numel():
        grid = (ceil_div(rows, options.rows) * ceil_div(width, options.columns),)
        _forward_kernel[grid](
            *(x, previous, starts(tokens, cu_seqlens), *six(mixes), *six(out), tokens, rows),
            C=width,
            ROWS=options.rows,
            COLUMNS=options.columns,
            **options.launch,
        )
    return out


def backward(
    x: Tensor, previous: Tensor, mixes: list[Tensor], cu_seqlens: Tensor | None, dout: list[Tensor]
) -> list[Tensor]:
    """Launch: gradients of x, previous and of every mix."""
    batch, tokens, width = x.shape
    rows, options = batch * tokens, options_for(TABLE, "backward", x.dtype, width, x.device)
    dx, dprevious = torch.empty_like(x), torch.zeros_like(previous)
    parts = ceil_div(rows, options.rows)
    partial = x.new_empty(parts, len(mixes), width, dtype=torch.float32)
    if x.numel():
        _backward_kernel[(parts * ceil_div(width, options.columns),)](
            *(x, previous, starts(tokens, cu_seqlens), *six(mixes), *six(dout)),
            *(dx, dprevious, partial, tokens, rows),
            M=len(mixes),
            C=width,
            ROWS=options.rows,
            COLUMNS=options.columns,
            **options.launch,
        )
    dmixes = partial.sum(dim=0).to(mixes[0].dtype)
    return [dx, dprevious, *(row.clone() for row in dmixes)]


def _fake(x: Tensor, _: Tensor, mixes: list[Tensor], __: Any, dtype: torch.dtype) -> list[Tensor]:
    return [torch.empty_like(x, dtype=dtype) for _ in mixes]


@operator("token_shift", _fake, lambda grads, _, x: backward(x[0], x[1], x[2], x[3], grads))
def token_shift(
    x: Tensor, previous: Tensor, mixes: list[Tensor], cu_seqlens: Tensor | None, dtype: torch.dtype
) -> list[Tensor]:
    """As `forward`; tensors are contiguous."""
    return forward(x, previous, mixes, cu_seqlens, dtype)
