# mypy: allow-untyped-defs, allow-incomplete-defs
"""A two-level scan: what segments do to the state, from which state each starts, what they give.

Three kernels: the summary (P, D) of every segment, all segments at once; the starts, one segment of
a sequence after the other; every segment from its own start. Where sequences and heads fill the
device there is one segment each, and the last kernel alone. A program has one head of one segment,
goes through its chunks and holds S [V, K] in registers: between the kernels there is nothing but
states. Tokens are columns of what is multiplied, so that tensor cores get their 64 rows. Axes and
names as in `triton_chunk.py`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvx_kernels.tools.sizes import ceil_div
from rwkvx_kernels.tools.triton_products import load_exact, precisions, product
from rwkvx_kernels.tools.triton_tiles import load, store
from rwkvx_kernels.wkv7.triton_chunk import (
    Layout,
    Plan,
    block,
    constants,
    decays,
    inverse,
    later,
    locate,
    since,
    stage,
)
from rwkvx_kernels.wkv7.triton_step import recur


class Run(NamedTuple):
    """y [B, T, H, V], final states; for the backward pass states before chunks [chunks, H, V, K]
    and U [B, T, H, V] (None: not kept), P [S, H, K, K] (empty where nothing was cut)."""

    y: Tensor
    final: Tensor
    states: Tensor | None
    u: Tensor | None
    p: Tensor


@triton.jit(do_not_specialize=["tokens", "per_sequence"])
def _summary_kernel(
    p_log_decay, p_k, p_v, p_alpha, p_beta, p_table, p_p, p_d,
    tokens, per_sequence,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr, KEPT: tl.constexpr, LENGTH: tl.constexpr,
    STATE: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (max(K, V) + COLUMNS - 1) // COLUMNS
    i_sh = tl.program_id(0) // TILES
    first, count, _ = locate(i_sh // H, p_table, tokens, per_sequence, LENGTH, KEPT)
    o_k, i_row = tl.arange(0, BLOCK_K), tl.arange(0, CHUNK)[:, None]
    # Rows of D, and of P: the recurrence of the identity, without values.
    o_column = (tl.program_id(0) % TILES) * COLUMNS + tl.arange(0, COLUMNS)
    b_d = tl.zeros((COLUMNS, BLOCK_K), tl.float32)
    b_p = tl.where(o_column[:, None] == o_k[None, :], 1.0, 0.0)
    i_first = first * H + i_sh % H
    o_key, o_value = i_row * (H * K) + o_k[None, :], i_row * (H * V) + o_column[None, :]
    for start in tl.range(0, count, CHUNK, disable_licm=True):
        o_first, m_row = i_first + start * H, i_row < count - start
        first_k, m_key = o_first * K, m_row & (o_k[None, :] < K)
        b_log_decay, b_centred, b_middle, b_rest = decays(
            p_log_decay + first_k, o_key, m_key, CHUNK
        )
        b_alpha = load(p_alpha + first_k, o_key, m_key) * tl.exp(b_centred - b_log_decay)
        b_alpha = tl.trans(b_alpha)
        b_d, b_p = b_d * tl.exp(b_middle)[None, :], b_p * tl.exp(b_middle)[None, :]
        b_ud, b_up = product(b_d, b_alpha, STATE), product(b_p, b_alpha, STATE)
        b_k = load(p_k + first_k, o_key, m_key) * tl.exp(-b_centred)
        b_scores = later(product(b_k, b_alpha, STATE), CHUNK)
        b_v = tl.trans(load_exact(p_v + o_first * V, o_value, m_row & (o_column[None, :] < V)))
        b_ud += product(b_v, b_scores, STATE)
        b_d += product(b_v, b_k, STATE)
        b_beta = load(p_beta + first_k, o_key, m_key) * tl.exp(-b_centred)
        b_inverse = inverse(later(product(b_beta, b_alpha, STATE), CHUNK), CHUNK, STATE)
        b_ud, b_up = product(b_ud, b_inverse, STATE), product(b_up, b_inverse, STATE)
        b_d = (b_d + product(b_ud, b_beta, STATE)) * tl.exp(b_rest)[None, :]
        b_p = (b_p + product(b_up, b_beta, STATE)) * tl.exp(b_rest)[None, :]
    o_end, m_k = o_column[:, None] * K + o_k[None, :], o_k[None, :] < K
    p_d, p_p = p_d + i_sh.to(tl.int64) * (V * K), p_p + i_sh.to(tl.int64) * (K * K)
    tl.store(p_d + o_end, b_d, mask=m_k & (o_column[:, None] < V))
    tl.store(p_p + o_end, b_p, mask=m_k & (o_column[:, None] < K))


@triton.jit(do_not_specialize=["per_sequence"])
def _follow_kernel(
    p_p, p_d, p_start, p_bounds, p_starts, p_end,
    per_sequence,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr,
    COLUMNS: tl.constexpr, REVERSE: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """S' = S P + D from segment to segment; reverse, dS = dS' P^T + D."""
    TILES: tl.constexpr = (V + COLUMNS - 1) // COLUMNS
    i_nh = tl.program_id(0) // TILES
    i_n, i_h = i_nh // H, i_nh % H
    o_k = tl.arange(0, BLOCK_K)
    o_v = (tl.program_id(0) % TILES) * COLUMNS + tl.arange(0, COLUMNS)
    o_tile = o_v[:, None] * K + o_k[None, :]
    m_tile = (o_v[:, None] < V) & (o_k[None, :] < K)
    if p_bounds is None:
        begin, segments = i_n.to(tl.int64) * per_sequence, per_sequence
    else:
        begin = tl.load(p_bounds + i_n)
        segments = (tl.load(p_bounds + i_n + 1) - begin).to(tl.int32)
    o_p = o_k[:, None] + o_k[None, :] * K if REVERSE else o_k[:, None] * K + o_k[None, :]
    m_p = (o_k[:, None] < K) & (o_k[None, :] < K)
    o_state = i_nh.to(tl.int64) * (V * K) + o_tile
    b_state = tl.load(p_start + o_state, mask=m_tile, other=0.0)
    for step in range(segments):
        i_s = begin + (segments - 1 - step if REVERSE else step)
        i_sh = i_s * H + i_h
        b_p = load(p_p + i_sh * (K * K), o_p, m_p)
        b_d = load(p_d + i_sh * (V * K), o_tile, m_tile)
        tl.store(p_starts + i_sh * (V * K) + o_tile, b_state, mask=m_tile)
        b_state = b_d + product(b_state, b_p, STATE)
    tl.store(p_end + o_state, b_state, mask=m_tile)


@triton.jit(do_not_specialize=["tokens", "per_sequence"])
def _segment_kernel(
    p_r, p_log_decay, p_k, p_v, p_alpha, p_beta, p_table, p_start, p_y, p_end, p_states, p_u,
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
    b_state = tl.load(p_start + i_sh.to(tl.int64) * (V * K) + o_tile, mask=m_tile, other=0.0)
    i_first = first * H + i_sh % H
    o_key, o_value = i_row * (H * K) + o_k[None, :], i_row * (H * V) + o_v[None, :]
    for start in tl.range(0, count, CHUNK, disable_licm=True):
        if p_states is not None:  # noqa: SIM102 (known when compiled, and not)
            if start % KEPT == 0:
                o_before = ((i_chunk + start // KEPT) * H + i_sh % H) * (V * K)
                store(p_states + o_before, o_tile, b_state, m_tile)
        o_first, m_row = i_first + start * H, i_row < count - start
        first_k, m_key = o_first * K, m_row & (o_k[None, :] < K)
        m_value = m_row & (o_v[None, :] < V)
        b_v = tl.trans(load_exact(p_v + o_first * V, o_value, m_value))
        b_log_decay, b_centred, b_middle, b_rest = decays(
            p_log_decay + first_k, o_key, m_key, CHUNK
        )
        # U = I (alpha S^T + A_ak V), then Y = r S^T + A_rk V + A_rb U, transposed
        b_state *= tl.exp(b_middle)[None, :]
        b_alpha = tl.trans(load(p_alpha + first_k, o_key, m_key) * tl.exp(b_centred - b_log_decay))
        b_k = load(p_k + first_k, o_key, m_key) * tl.exp(-b_centred)
        b_u = product(b_v, later(product(b_k, b_alpha, STATE), CHUNK), STATE)
        b_u += product(b_state, b_alpha, STATE)
        b_beta = load(p_beta + first_k, o_key, m_key) * tl.exp(-b_centred)
        b_inverse = inverse(later(product(b_beta, b_alpha, STATE), CHUNK), CHUNK, STATE)
        b_u = product(b_u, b_inverse, STATE)
        if p_u is not None:
            store(p_u + o_first * V, o_value, tl.trans(b_u), m_value)
        b_r = tl.trans(load(p_r + first_k, o_key, m_key) * tl.exp(b_centred))
        b_y = product(b_state, b_r, LOCAL)
        b_y += product(b_v, since(product(b_k, b_r, LOCAL), CHUNK), LOCAL)
        b_y += product(b_u, since(product(b_beta, b_r, LOCAL), CHUNK), LOCAL)
        store(p_y + o_first * V, o_value, tl.trans(b_y), m_value)
        if BLOCK_K > 64:  # read again: everything at once does not fit into registers
            b_k = load(p_k + first_k, o_key, m_key) * tl.exp(-b_centred)
            b_beta = load(p_beta + first_k, o_key, m_key) * tl.exp(-b_centred)
        b_state += product(b_v, b_k, STATE) + product(b_u, b_beta, STATE)
        b_state *= tl.exp(b_rest)[None, :]
    if tl.max(tl.max(tl.where(tl.abs(b_state) < float("inf"), 0, 1), axis=1), axis=0) > 0:
        # Products took what is not finite to earlier tokens of its chunk, times zeros: all again,
        # token by token.
        b_state = tl.load(p_start + i_sh.to(tl.int64) * (V * K) + o_tile, mask=m_tile, other=0.0)
        b_state = recur(
            p_r, p_log_decay, p_k, p_v, p_alpha, p_beta, p_y, b_state, i_first, count, o_k, o_v,
            H, K, V,
        )  # fmt: skip
    if p_end is not None:
        tl.store(p_end + i_sh.to(tl.int64) * (V * K) + o_tile, b_state, mask=m_tile)


def follow(
    p: Tensor, d: Tensor, start: Tensor, layout: Layout, r: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Launch: where segments start [S, H, V, K], and the state at the end of every sequence.

    p [S, H, K, K], d [S, H, V, K]; start [B, H, V, K]. Backward from the last to the first.
    """
    sequences, heads, value, key = start.shape
    options = stage("follow", r, d.transpose(2, 3))
    columns = min(options.columns, block(value))
    starts, end = torch.empty_like(d), torch.empty_like(start)
    programs = sequences * heads * ceil_div(value, columns)
    if programs:
        _follow_kernel[(programs,)](
            p, d, start, layout.bounds, starts, end, layout.plan.per_sequence,
            H=heads, K=key, V=value, BLOCK_K=block(key), COLUMNS=columns, REVERSE=reverse,
            STATE=precisions(r.dtype, r.device)[0], **options.launch,
        )  # fmt: skip
    return starts, end


def summaries(tensors: list[Tensor], layout: Layout) -> tuple[Tensor, Tensor]:
    """Launch: P [S, H, K, K] and D [S, H, V, K] of every segment."""
    r, _, _, v, _, _ = tensors
    heads, key, value = *r.shape[2:], v.shape[3]
    p = r.new_empty(layout.plan.segments, heads, key, key, dtype=torch.float32)
    d = r.new_empty(layout.plan.segments, heads, value, key, dtype=torch.float32)
    options = stage("summary", r, v)
    columns = min(options.columns, block(max(key, value)))
    programs = layout.plan.segments * heads * ceil_div(max(key, value), columns)
    if programs:
        _summary_kernel[(programs,)](
            *tensors[1:], layout.table, p, d, *layout.arguments,
            COLUMNS=columns, **constants(options, layout, r, v),
        )  # fmt: skip
    return p, d


def run(tensors: list[Tensor], state: Tensor, layout: Layout, keep: bool) -> Run:
    """Launch everything: three kernels, or one. `keep` what the backward pass needs."""
    r, _, _, v, _, _ = tensors
    heads, value = v.shape[2:]
    states, u = (states_like(r, v, layout.plan), torch.empty_like(v)) if keep else (None, None)
    if layout.plan.split:
        p, d = summaries(tensors, layout)
        starts, final = follow(p, d, state, layout, r, reverse=False)
        end = None
    else:
        p, starts, final = r.new_empty(0, dtype=torch.float32), state, torch.empty_like(state)
        end = final
    y = torch.empty_like(v)
    options = stage("segment", r, v)
    columns = min(options.columns, block(value))
    programs = layout.plan.segments * heads * ceil_div(value, columns)
    if programs:
        _segment_kernel[(programs,)](
            *tensors, layout.table, starts, y, end, states, u, *layout.arguments,
            COLUMNS=columns, **constants(options, layout, r, v),
        )  # fmt: skip
    return Run(y, final, states, u, p)


def states_like(r: Tensor, v: Tensor, plan: Plan) -> Tensor:
    """Empty, for the state before each chunk: what is multiplied by bfloat16 needs no more."""
    dtype = torch.bfloat16 if r.dtype == torch.bfloat16 else torch.float32
    return r.new_empty(plan.chunks, r.shape[2], v.shape[3], r.shape[3], dtype=dtype)
