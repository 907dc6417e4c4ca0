# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"
"""Products with all matrices that read one vector, in one launch, and what comes before and after.

A block reads a vector three times: the normalised token (all matrices and first low-rank factors of
a mixer, each with a mix of its own), what the mixer made (the output projection), and so for the
channel mix. Every program normalises for itself: that costs a few KB from the cache, and a launch
costs more. Weights are asked for before the launch before has ended, so that they are on their way.

Axes: B rows of the batch, C width, O outputs, I inputs, R rank. Names: i_ index, p_ pointer, b_
tile in registers, o_ offset, m_ mask. What is not there (mixes, scales, factors) is None.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvx_kernels.one_token.options import MOST_ROWS, TABLE
from rwkvx_kernels.one_token.triton_inputs import (
    beside,
    exact,
    mixed,
    pick,
    read,
    statistics,
    tanh,
)
from rwkvx_kernels.token_shift import Norm
from rwkvx_kernels.tools.sizes import ceil_div, next_power_of_2
from rwkvx_kernels.tools.triton_options import options_for
from rwkvx_kernels.tools.triton_overlap import overlapping, wait_for_launches
from rwkvx_kernels.tools.triton_products import precisions, product
from rwkvx_kernels.tools.triton_tiles import load, store


@triton.jit
def matrix_rows(
    p_w, p_scale, o_o, outputs, p_x, p_before, p_weight, p_bias, p_mix, eps, o_b, m_b,
    INPUTS: tl.constexpr, K: tl.constexpr, NORM_K: tl.constexpr, UNROLLED: tl.constexpr,
    PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Some outputs of a matrix [O, I]: [B, outputs] float32."""
    o_k, m_o = tl.arange(0, K)[None, :], (o_o < outputs)[:, None]
    p_row = p_w + o_o.to(tl.int64)[:, None] * INPUTS
    AHEAD: tl.constexpr = UNROLLED if o_b.shape[0] == 1 else 1
    ahead = ()
    for j in tl.static_range(AHEAD):
        o_i = j * K + o_k
        b_ahead = tl.load(p_row + o_i, mask=m_o & (o_i < INPUTS), other=0)
        ahead = ahead + (b_ahead,)  # noqa: RUF005
    NORMED: tl.constexpr = o_b.shape[0] == 1 and p_weight is not None
    if NORMED:
        found = beside(p_before, p_weight, p_bias, p_mix, o_b, o_k, m_b, AHEAD, K, INPUTS)
    wait_for_launches(OVERLAP)
    b_mean, b_inverse = 0.0, 1.0
    if p_weight is not None:
        b_mean, b_inverse = statistics(p_x, o_b, m_b, eps, INPUTS, NORM_K)
    how = (p_x, p_before, p_weight, p_bias, p_mix, b_mean, b_inverse, o_b)
    if o_b.shape[0] == 1:
        b_sum = tl.zeros((o_o.shape[0], K), tl.float32)
        for j in tl.static_range(AHEAD):
            o_i = j * K + o_k
            b_x = load(p_x, o_b * INPUTS + o_i, m_b & (o_i < INPUTS))
            if NORMED:  # zeros of the weights are beyond the last input
                b_x = mixed(
                    b_x, b_mean, b_inverse, found[0][j], found[1][j], found[2][j], found[3][j]
                )
            b_sum += ahead[j].to(tl.float32) * b_x
        # So many at once are on their way.
        for i_first in range(AHEAD * K, INPUTS, UNROLLED * K):
            for j in tl.static_range(UNROLLED):
                o_i = i_first + j * K + o_k
                b_w = load(p_row, o_i, m_o & (o_i < INPUTS))
                b_sum += b_w * read(*how, o_i, m_b & (o_i < INPUTS), INPUTS)
        b_y = tl.sum(b_sum, axis=1)[None, :]
    else:
        b_x = read(*how, o_k, m_b & (o_k < INPUTS), INPUTS)
        b_y = product(b_x, tl.trans(exact(ahead[0])), PRECISION)
        for i in range(K, INPUTS, K):
            b_w = tl.load(p_row + i + o_k, mask=m_o & (i + o_k < INPUTS), other=0)
            b_x = read(*how, i + o_k, m_b & (i + o_k < INPUTS), INPUTS)
            b_y += product(b_x, tl.trans(exact(b_w)), PRECISION)
    if p_scale is not None:
        b_y *= load(p_scale, o_o, o_o < outputs)[None, :]
    return b_y


@triton.jit
def factor_columns(
    p_w, o_r, rank, p_x, p_before, p_weight, p_bias, p_mix, eps, o_b, m_b,
    C: tl.constexpr, K: tl.constexpr, NORM_K: tl.constexpr, PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Some columns of a factor [C, R]: [B, columns] float32."""
    o_k, m_r = tl.arange(0, K), (o_r < rank)[None, :]
    AHEAD: tl.constexpr = min(4, (C + K - 1) // K) if o_b.shape[0] == 1 else 0
    ahead = ()
    for j in tl.static_range(AHEAD):
        o_i = (j * K + o_k)[:, None]
        b_ahead = tl.load(p_w + o_i * rank + o_r[None, :], mask=(o_i < C) & m_r, other=0.0)
        ahead = ahead + (b_ahead,)  # noqa: RUF005
    if AHEAD > 0:
        found = beside(p_before, p_weight, p_bias, p_mix, o_b, o_k[:, None], m_b, AHEAD, K, C)
    wait_for_launches(OVERLAP)
    b_mean, b_inverse = statistics(p_x, o_b, m_b, eps, C, NORM_K)
    how = (p_x, p_before, p_weight, p_bias, p_mix, b_mean, b_inverse)
    b_sum = tl.zeros((K, o_r.shape[0]), tl.float32)
    b_y = tl.zeros((o_b.shape[0], o_r.shape[0]), tl.float32)
    if o_b.shape[0] == 1:
        for j in tl.static_range(AHEAD):
            o_i = (j * K + o_k)[:, None]
            b_x = load(p_x, o_b * C + o_i, m_b & (o_i < C))
            b_x = mixed(b_x, b_mean, b_inverse, found[0][j], found[1][j], found[2][j], found[3][j])
            b_sum += ahead[j].to(tl.float32) * b_x
        for i in range(AHEAD * K, C, K):
            o_i = (i + o_k)[:, None]
            b_w = load(p_w, o_i * rank + o_r[None, :], (o_i < C) & m_r)
            b_sum += b_w * read(*how, o_b, o_i, m_b & (o_i < C), C)
        b_y = tl.sum(b_sum, axis=0)[None, :]
    else:
        for i in range(0, C, K):
            o_i, o_x = (i + o_k)[:, None], (i + o_k)[None, :]
            p_tile = p_w + o_i * rank + o_r[None, :]
            b_w = tl.load(p_tile, mask=(o_i < C) & m_r, other=0.0)
            b_x = read(*how, o_b, o_x, m_b & (o_x < C), C)
            b_y += product(b_x, exact(b_w), PRECISION)
    return b_y


@triton.jit(do_not_specialize=["batch"])
def _read_kernel(
    p_x, p_before, p_weight, p_bias, p_now,
    p_m0, p_m1, p_m2, p_w0, p_w1, p_w2, p_s0, p_s1, p_s2, p_y,
    p_mf0, p_mf1, p_mf2, p_mf3, p_f0, p_f1, p_f2, p_f3, p_low,
    batch, eps,
    C: tl.constexpr, O0: tl.constexpr, O1: tl.constexpr, O2: tl.constexpr,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, R3: tl.constexpr,
    SQUARED: tl.constexpr, BLOCK_B: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr,
    COLUMNS: tl.constexpr, FACTOR_K: tl.constexpr, NORM_K: tl.constexpr, UNROLLED: tl.constexpr,
    PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Programs are tiles of the factors, which have most to read, then of the matrices; the last
    one keeps the normalised token."""
    o_b = (tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B))[:, None]
    m_b = o_b < batch
    how = (p_x, p_before, p_weight, p_bias)
    i_tile = tl.program_id(0)
    F1: tl.constexpr = (R0 + COLUMNS - 1) // COLUMNS
    F2: tl.constexpr = F1 + (R1 + COLUMNS - 1) // COLUMNS
    F3: tl.constexpr = F2 + (R2 + COLUMNS - 1) // COLUMNS
    FACTORS: tl.constexpr = F3 + (R3 + COLUMNS - 1) // COLUMNS
    M1: tl.constexpr = FACTORS + (O0 + ROWS - 1) // ROWS
    M2: tl.constexpr = M1 + (O1 + ROWS - 1) // ROWS
    TILES: tl.constexpr = M2 + (O2 + ROWS - 1) // ROWS
    if i_tile >= TILES:
        wait_for_launches(OVERLAP)
        b_mean, b_inverse = statistics(p_x, o_b, m_b, eps, C, NORM_K)
        o_k = tl.arange(0, NORM_K)[None, :]
        for i in range(0, C, NORM_K):
            m_x = m_b & (i + o_k < C)
            b_x = read(*how, None, b_mean, b_inverse, o_b, i + o_k, m_x, C)
            store(p_now, o_b * C + i + o_k, b_x, m_x)
    elif i_tile >= FACTORS:
        i_w = (i_tile >= M1).to(tl.int32) + (i_tile >= M2).to(tl.int32)
        first = tl.where(i_w == 0, FACTORS, tl.where(i_w == 1, M1, M2))
        outputs = tl.where(i_w == 0, O0, tl.where(i_w == 1, O1, O2))
        before = tl.where(i_w == 0, 0, tl.where(i_w == 1, O0, O0 + O1))
        # Triton 3.6 returns no None from a function.
        p_scale, p_mix = p_s0, p_m0
        if p_s0 is not None:
            p_scale = pick(i_w, p_s0, p_s1, p_s2, None)
        if p_m0 is not None:
            p_mix = pick(i_w, p_m0, p_m1, p_m2, None)
        o_o = (i_tile - first) * ROWS + tl.arange(0, ROWS)
        b_y = matrix_rows(
            pick(i_w, p_w0, p_w1, p_w2, None), p_scale, o_o, outputs, *how, p_mix, eps, o_b, m_b,
            C, K, NORM_K, UNROLLED, PRECISION, OVERLAP,
        )  # fmt: skip
        if SQUARED:
            b_y = tl.maximum(b_y, 0.0, propagate_nan=tl.PropagateNan.ALL)
            b_y = b_y * b_y
        o_y = (batch * before).to(tl.int64) + o_b.to(tl.int64) * outputs + o_o[None, :]
        store(p_y, o_y, b_y, m_b & (o_o < outputs)[None, :])
    elif FACTORS > 0:
        i_f = (i_tile >= F1).to(tl.int32) + (i_tile >= F2).to(tl.int32)
        i_f += (i_tile >= F3).to(tl.int32)
        first = tl.where(i_f < 2, tl.where(i_f == 0, 0, F1), tl.where(i_f == 2, F2, F3))
        rank = tl.where(i_f < 2, tl.where(i_f == 0, R0, R1), tl.where(i_f == 2, R2, R3))
        before = tl.where(i_f < 2, 0, R0 + R1) + tl.where(i_f == 1, R0, 0)
        before += tl.where(i_f == 3, R2, 0)
        o_r = (i_tile - first) * COLUMNS + tl.arange(0, COLUMNS)
        b_low = factor_columns(
            pick(i_f, p_f0, p_f1, p_f2, p_f3), o_r, rank, *how,
            pick(i_f, p_mf0, p_mf1, p_mf2, p_mf3), eps, o_b, m_b, C, FACTOR_K, NORM_K, PRECISION,
            OVERLAP,
        )  # fmt: skip
        b_low = tl.where(i_f == 0, tanh(b_low), tl.where(i_f == 3, tl.sigmoid(b_low), b_low))
        o_low = o_b * (R0 + R1 + R2 + R3) + before + o_r[None, :]
        store(p_low, o_low, b_low, m_b & (o_r < rank)[None, :])


@triton.jit(do_not_specialize=["batch"])
def _add_kernel(
    p_y, p_w, p_scale, p_x, p_now, p_shift, batch,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, BLOCK_B: tl.constexpr, ROWS: tl.constexpr,
    K: tl.constexpr, UNROLLED: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """x += W y; and what the next token mixes with takes the place of what this one did."""
    o_b = (tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B))[:, None]
    o_o = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_x, m_x = o_b * OUTPUTS + o_o[None, :], (o_b < batch) & (o_o < OUTPUTS)[None, :]
    b_x = tl.load(p_x + o_x, mask=m_x, other=0.0)  # read by the launch before, and not written
    b_y = matrix_rows(
        p_w, p_scale, o_o, OUTPUTS, p_y, None, None, None, None, 0.0, o_b, o_b < batch, INPUTS, K,
        K, UNROLLED, PRECISION, OVERLAP,
    )  # fmt: skip
    tl.store(p_x + o_x, b_x + b_y, mask=m_x)
    if p_shift is not None:
        store(p_shift, o_x, load(p_now, o_x, m_x), m_x)


@triton.jit
def _embed_kernel(
    p_ids, p_table, p_weight, p_bias, p_x, eps,
    C: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A row of the embedding, normalised."""
    wait_for_launches(OVERLAP)
    i_b = tl.program_id(0)
    o_b, o_c = tl.zeros((1, 1), tl.int32), tl.arange(0, BLOCK)[None, :]
    p_row = p_table + tl.load(p_ids + i_b).to(tl.int64) * C
    b_mean, b_inverse = statistics(p_row, o_b, o_b == 0, eps, C, BLOCK)
    for i in range(0, C, BLOCK):
        m_x = i + o_c < C
        b_x = read(p_row, None, p_weight, p_bias, None, b_mean, b_inverse, o_b, i + o_c, m_x, C)
        store(p_x + i_b * C, i + o_c, b_x, m_x)


class Matrix(NamedTuple):
    """[O, I]; int8 with a scale for each row; the mix of its input, where it has one."""

    weight: Tensor
    scale: Tensor | None = None
    mix: Tensor | None = None


def sizes(rows: int, inputs: int, like: Tensor) -> tuple[dict[str, Any], int, int]:
    """Constants and options of a launch for so many rows of the batch; outputs of a program, and
    tiles of rows."""
    stage = "token" if rows == 1 else "tokens"
    options = options_for(TABLE, stage, like.dtype, 1, like.device)
    block = 1 if rows == 1 else min(MOST_ROWS, max(16, next_power_of_2(rows)))
    dtype = like.dtype if like.dtype.is_floating_point else torch.bfloat16
    columns = min(options.columns, max(16, next_power_of_2(inputs)))
    constants = {
        "BLOCK_B": block,
        "ROWS": options.rows,
        "K": columns,
        "UNROLLED": min(4, ceil_div(inputs, columns)),
        "PRECISION": precisions(dtype, like.device)[0],
        **options.launch,
        **overlapping(like.device),
    }
    return constants, options.rows, ceil_div(rows, block)


def read_token(
    x: Tensor,
    before: Tensor | None,
    norm: Norm,
    matrices: list[Matrix],
    factors: list[tuple[Tensor | None, Tensor | None]],
    squared: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[Tensor], Tensor | None, Tensor]:
    """Launch: what up to three matrices make of norm(x), mixed with what was before it.

    Args:
        x: [B, C] float32. before: [B, C], for those with a mix.
        factors: none, or [C, R] of w, a, v, g and their mixes; None for what is not there.
        squared: the squared ReLU of the outputs.

    Returns:
        [B, O] of each matrix; [B, R of all], after tanh (w) and sigmoid (g); norm(x) [B, C].
    """
    batch, width = x.shape
    outputs = [len(m.weight) for m in matrices]
    constants, rows, tiles_b = sizes(batch, width, matrices[0].weight)
    options = options_for(TABLE, "factors", x.dtype, 1, x.device)
    ranks = [0 if f is None else f.shape[1] for f, _ in factors] or [0] * 4
    flat = x.new_empty(batch * sum(outputs), dtype=dtype)
    low = x.new_empty(batch, sum(ranks)) if factors else None
    now = torch.empty_like(x)
    # One that is missing has no programs; a pointer must stand there.
    downs = [factors[0][0] if f is None else f for f, _ in factors] or [None] * 4
    mixes = [m for _, m in factors] or [None] * 4
    tiles = sum(ceil_div(n, options.rows) for n in ranks)
    tiles += sum(ceil_div(n, rows) for n in outputs)
    three = [*matrices, *[Matrix(None, None, None)] * (3 - len(matrices))]  # type: ignore[arg-type]
    _read_kernel[(tiles + 1, tiles_b)](
        x, before, norm.weight, norm.bias, now, *(m.mix for m in three),
        *(m.weight for m in three), *(m.scale for m in three), flat, *mixes, *downs, low,
        batch, norm.eps,
        C=width, **{f"O{i}": n for i, n in enumerate([*outputs, 0, 0][:3])},
        **{f"R{i}": n for i, n in enumerate(ranks)}, SQUARED=squared, COLUMNS=options.rows,
        NORM_K=min(4096 // constants["BLOCK_B"], next_power_of_2(width)),
        FACTOR_K=min(options.columns, max(16, next_power_of_2(width)))
        if batch == 1 else constants["K"],
        **constants,
    )  # fmt: skip
    parts = flat.split([batch * n for n in outputs])
    return [p.view(batch, -1) for p in parts], low, now


def add_product(
    x: Tensor,
    y: Tensor,
    matrix: Matrix,
    now: Tensor | None = None,
    shift: Tensor | None = None,
) -> None:
    """Launch: x [B, O] += W y [B, I], float32, in place; shift [B, O] becomes `now`."""
    batch, inputs = y.shape
    constants, rows, tiles_b = sizes(batch, inputs, matrix.weight)
    _add_kernel[(ceil_div(x.shape[1], rows), tiles_b)](
        y,
        matrix.weight,
        matrix.scale,
        x,
        now,
        shift,
        batch,
        OUTPUTS=x.shape[1],
        INPUTS=inputs,
        **constants,
    )


def embed_rows(ids: Tensor, table: Tensor, norm: Norm) -> Tensor:
    """Launch: ids [B] -> norm(table[ids]) [B, C] float32."""
    width = table.shape[1]
    x = torch.empty((len(ids), width), dtype=torch.float32, device=ids.device)
    block = min(4096, next_power_of_2(width))
    _embed_kernel[(len(ids),)](
        ids, table, *norm[:2], x, norm.eps, C=width, BLOCK=block, **overlapping(ids.device)
    )
    return x
