# mypy: allow-untyped-defs, allow-incomplete-defs
"""The gradient of the state, from the last chunk of a segment to the first, as a two-level scan.

One kernel twice: from zeros, what every segment adds to the gradient of its start (which then
follow from each other, with P transposed); from its own end, the gradients after chunks, X and dV.
Axes and names as in `triton_chunk.py`, equations as in README.md; T is the gradient of the state
before its decay from the middle to the end of the chunk.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvx_kernels.tools.sizes import ceil_div
from rwkvx_kernels.tools.triton_products import load_exact, product
from rwkvx_kernels.tools.triton_tiles import load, store
from rwkvx_kernels.wkv7.triton_chunk import (
    Layout,
    block,
    constants,
    decays,
    inverse,
    later,
    load_decay,
    locate,
    since,
    stage,
)
from rwkvx_kernels.wkv7.triton_segments import follow, states_like


@triton.jit
def _through_alpha(b_x, b_k, b_alpha, CHUNK: tl.constexpr, STATE: tl.constexpr):
    """A_ak^T X, transposed."""
    b_scores = later(product(b_k, tl.trans(b_alpha), STATE), CHUNK)
    return product(b_x, tl.trans(b_scores), STATE)


@triton.jit(do_not_specialize=["tokens", "per_sequence"])
def _carry_kernel(
    p_r, p_log_decay, p_k, p_alpha, p_beta, p_dy, p_start, p_table, p_end, p_kept, p_x, p_dv,
    tokens, per_sequence,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr, KEPT: tl.constexpr, LENGTH: tl.constexpr,
    STATE: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (V + COLUMNS - 1) // COLUMNS
    i_sh = tl.program_id(0) // TILES
    first, count, i_chunk = locate(i_sh // H, p_table, tokens, per_sequence, LENGTH, KEPT)
    o_k, i_row = tl.arange(0, BLOCK_K), tl.arange(0, CHUNK)[:, None]
    o_v = (tl.program_id(0) % TILES) * COLUMNS + tl.arange(0, COLUMNS)
    o_tile = o_v[:, None] * K + o_k[None, :]
    m_tile = (o_v[:, None] < V) & (o_k[None, :] < K)
    if p_start is None:
        b_dstate = tl.zeros((COLUMNS, BLOCK_K), tl.float32)
    else:
        p_start += i_sh.to(tl.int64) * (V * K)
        b_dstate = tl.load(p_start + o_tile, mask=m_tile, other=0.0)
    i_first = first * H + i_sh % H
    o_key, o_value = i_row * (H * K) + o_k[None, :], i_row * (H * V) + o_v[None, :]
    chunks = tl.cdiv(count, CHUNK)
    if p_kept is not None:
        p_kept += i_sh % H * (V * K)
        if count > 0:
            o_after = (i_chunk + (count - 1) // KEPT) * (H * V * K)
            store(p_kept + o_after, o_tile, b_dstate, m_tile)
    for step in tl.range(chunks, disable_licm=True):
        start = (chunks - 1 - step) * CHUNK
        o_first, m_row = i_first + start * H, i_row < count - start
        first_k, first_v, m_key = o_first * K, o_first * V, m_row & (o_k[None, :] < K)
        m_value = m_row & (o_v[None, :] < V)
        b_log_decay, b_centred, b_middle, b_rest = decays(
            p_log_decay + first_k, o_key, m_key, CHUNK
        )
        # X = I^T (A_rb^T dY + beta T^T), transposed
        b_dt = b_dstate * tl.exp(b_rest)[None, :]
        b_beta = load(p_beta + first_k, o_key, m_key) * tl.exp(-b_centred)
        b_x = product(b_dt, tl.trans(b_beta), STATE)
        b_r = load(p_r + first_k, o_key, m_key) * tl.exp(b_centred)
        b_scores = since(product(b_beta, tl.trans(b_r), STATE), CHUNK)
        b_dy = tl.trans(load_exact(p_dy + first_v, o_value, m_value))
        b_x += product(b_dy, tl.trans(b_scores), STATE)
        b_alpha = load(p_alpha + first_k, o_key, m_key) * tl.exp(b_centred - b_log_decay)
        b_scores = later(product(b_beta, tl.trans(b_alpha), STATE), CHUNK)
        b_inverse = inverse(b_scores, CHUNK, STATE)
        b_x = product(b_x, tl.trans(b_inverse), STATE)
        if p_kept is not None:
            # dV = k T^T + A_ak^T X + A_rk^T dY, transposed
            store(p_x + first_v, o_value, tl.trans(b_x), m_value)
            b_k = load(p_k + first_k, o_key, m_key) * tl.exp(-b_centred)
            b_dv = product(b_dt, tl.trans(b_k), STATE)
            if BLOCK_K <= 64:
                b_dv += _through_alpha(b_x, b_k, b_alpha, CHUNK, STATE)
        # dS = (T + X^T alpha + dY^T r) decayed to the start
        b_dstate = b_dt + product(b_x, b_alpha, STATE) + product(b_dy, b_r, STATE)
        b_dstate *= tl.exp(b_middle)[None, :]
        if p_kept is not None:
            # r is read again: everything at once does not fit into registers.
            if BLOCK_K > 64:
                b_k = load(p_k + first_k, o_key, m_key) * tl.exp(-b_centred)
                b_dy = tl.trans(load_exact(p_dy + first_v, o_value, m_value))
            b_r = load(p_r + first_k, o_key, m_key) * tl.exp(b_centred)
            b_scores = since(product(b_k, tl.trans(b_r), STATE), CHUNK)
            b_dv += product(b_dy, tl.trans(b_scores), STATE)
            if BLOCK_K > 64:
                b_log_decay = load_decay(p_log_decay + first_k, o_key, m_key)
                b_alpha = load(p_alpha + first_k, o_key, m_key) * tl.exp(b_centred - b_log_decay)
                b_dv += _through_alpha(b_x, b_k, b_alpha, CHUNK, STATE)
            store(p_dv + first_v, o_value, tl.trans(b_dv), m_value)
            if start % KEPT == 0 and start > 0:
                o_after = (i_chunk + start // KEPT - 1) * (H * V * K)
                store(p_kept + o_after, o_tile, b_dstate, m_tile)
    tl.store(p_end + i_sh.to(tl.int64) * (V * K) + o_tile, b_dstate, mask=m_tile)


def _carry(
    tensors: list[Tensor], dy: Tensor, start: Tensor | None, layout: Layout, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    """Launch: the gradient of the state that segments start from [S, H, V, K], from that of the
    state that they end with (None: zeros); with `keep`, those after chunks [chunks, H, V, K], X and
    the gradient of v."""
    r, log_decay, k, v, alpha, beta = tensors
    heads, key, value = *r.shape[2:], v.shape[3]
    end = r.new_empty(layout.plan.segments, heads, value, key, dtype=torch.float32)
    kept = []
    if keep:
        kept = [states_like(r, v, layout.plan), torch.empty_like(v), torch.empty_like(v)]
    p_k, dstates, x, dv = [k, *kept] if keep else [None] * 4
    options = stage("carry", r, v)
    columns = min(options.columns, block(value))
    programs = layout.plan.segments * heads * ceil_div(value, columns)
    if programs:
        _carry_kernel[(programs,)](
            r, log_decay, p_k, alpha, beta, dy, start, layout.table, end, dstates, x, dv,
            *layout.arguments,
            COLUMNS=columns, **constants(options, layout, r, v),
        )  # fmt: skip
    return end, kept


def carry(
    tensors: list[Tensor], dy: Tensor, dfinal: Tensor, p: Tensor, layout: Layout
) -> tuple[Tensor, ...]:
    """Launch everything: gradients of the initial states and of the states after chunks; X; dV.

    p: of `triton_segments.run`.
    """
    starts, dstate = dfinal, None
    if layout.plan.split:
        added, _ = _carry(tensors, dy, None, layout, keep=False)
        starts, dstate = follow(p, added, dfinal, layout, tensors[0], reverse=True)
    end, kept = _carry(tensors, dy, starts, layout, keep=True)
    return end if dstate is None else dstate, *kept
