# mypy: allow-untyped-defs, allow-incomplete-defs
"""Gradients of the attention, recomputing the weights from the saved log-sum-exps; no atomics.

With P the weights, δ = Σ dO · O per row: dV = Pᵀ dO, dS = P ∘ (dO Vᵀ - δ), dQ = dS K, dK = dSᵀ Q.
The keys' gradients are summed per chunk, over its own queries and then over its list, and written
once; the queries' over the own chunk and then their slots: always in the same order.
Axes and names as in triton_forward.py; E segments of a group beside the first ones of its lists.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvx_kernels.chunk_attention.triton_forward import (
    LOG2E,
    TILES,
    Shape,
    own_rows,
)
from rwkvx_kernels.tools.sizes import ceil_div, next_power_of_2
from rwkvx_kernels.tools.triton_lists import Lists, later_segment, row_of, segment_of, segments_of
from rwkvx_kernels.tools.triton_tiles import finite, load_rows, store_rows

# A program goes through a whole list, unless it is longer than this and a part of all pairs: what
# such lists' other segments leave takes at most so many bytes.
LEAST_SEGMENT, SEGMENT_BYTES = 2048, 1 << 26


@triton.jit(do_not_specialize=["rows"])
def _delta_kernel(
    p_o, p_do, p_delta, rows, D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr
):
    """δ of a tile of rows."""
    o_row, o_d = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE), tl.arange(0, BLOCK_D)
    b_o = load_rows(p_o, o_row, o_row < rows, o_d, D, D).to(tl.float32)
    b_do = load_rows(p_do, o_row, o_row < rows, o_d, D, D).to(tl.float32)
    tl.store(p_delta + o_row, tl.sum(b_o * b_do, axis=1), mask=o_row < rows)


@triton.jit
def _load(p_q, p_do, p_lse, p_delta, o_row, m_row, o_d, D: tl.constexpr):
    """Rows of q and dO, with their log-sum-exp and δ; rows that are not there have no weights."""
    b_q, b_do = load_rows(p_q, o_row, m_row, o_d, D, D), load_rows(p_do, o_row, m_row, o_d, D, D)
    b_lse = tl.load(p_lse + o_row, mask=m_row, other=float("inf"))
    b_delta = tl.load(p_delta + o_row, mask=m_row, other=0.0)
    return b_q, b_do, b_lse, b_delta


@triton.jit
def _dscores(rows, b_k, b_v, scale, PRECISION: tl.constexpr):
    """dS of a tile, in float32."""
    b_q, b_do, b_lse, b_delta = rows
    b_score = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
    return tl.exp2(b_score - b_lse[:, None]) * (b_dp - b_delta[:, None])


@triton.jit
def _add_keys(
    b_dk, b_dv, b_k, b_v, rows, m_score, scale, ALL: tl.constexpr, PRECISION: tl.constexpr
):
    """Adds what the keys' and values' gradients get from a tile of rows: from all scores [keys,
    rows], or from those of the mask, whatever stands elsewhere."""
    b_q, b_do, b_lse, b_delta = rows
    b_score = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale
    b_p = tl.exp2(b_score - b_lse[None, :])
    if not ALL:
        b_p = tl.where(m_score, b_p, 0.0)
    b_dv += tl.dot(b_p.to(b_do.dtype), b_do, input_precision=PRECISION)
    b_ds = b_p * (tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION) - b_delta[None, :])
    if not ALL:
        b_ds = tl.where(m_score, b_ds, 0.0)
    b_dk += tl.dot(b_ds.to(b_q.dtype), b_q, input_precision=PRECISION)
    return b_dk, b_dv


@triton.jit(do_not_specialize=["group", "tokens", "pairs", "lists", "segment"])
def _pairs_dq_kernel(
    p_q, p_k, p_v, p_do, p_lse, p_delta, p_chosen, p_order, p_offsets, p_part,
    stride_b, stride_s, stride_g, scale, group, tokens, pairs, lists, segment,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, SLOTS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A segment of the pairs of one chunk: the gradient of each pair's query through that chunk."""
    i_n = tl.program_id(1).to(tl.int64)
    i_group = group + i_n
    p_order += i_n * pairs
    i_chunk, begin, end = segment_of(
        tl.program_id(0), p_order, p_offsets + i_n * (lists + 1), p_chosen, i_group, tokens, pairs,
        lists, segment, H, G, SLOTS,
    )  # fmt: skip
    if begin >= end:
        return
    o_d, o_key = tl.arange(0, BLOCK_D), tl.arange(0, KEYS)
    shift = i_group // G * stride_b + i_group % G * stride_g
    shift += i_chunk.to(tl.int64) * CHUNK * stride_s
    b_k = load_rows(p_k + shift, o_key, o_key < CHUNK, o_d, stride_s, D)
    b_v = load_rows(p_v + shift, o_key, o_key < CHUNK, o_d, stride_s, D)
    for i_pair in range(begin, end, TILE):
        o_place = i_pair + tl.arange(0, TILE)
        m_pair = o_place < end
        o_pair = tl.load(p_order + o_place, mask=m_pair, other=0)
        o_row = row_of(i_group, o_pair, tokens, H, G, SLOTS)
        rows = _load(p_q, p_do, p_lse, p_delta, o_row, m_pair, o_d, D)
        if CHUNK <= KEYS:
            b_ds = _dscores(rows, b_k, b_v, scale, PRECISION)
            if CHUNK < KEYS:
                b_ds = tl.where((o_key < CHUNK)[None, :], b_ds, 0.0)
            b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, input_precision=PRECISION)
        else:
            b_dq = tl.zeros((TILE, BLOCK_D), tl.float32)
            for i_s in range(0, CHUNK, KEYS):
                m_s = i_s + o_key < CHUNK
                b_k = load_rows(p_k + shift, i_s + o_key, m_s, o_d, stride_s, D)
                b_v = load_rows(p_v + shift, i_s + o_key, m_s, o_d, stride_s, D)
                b_ds = _dscores(rows, b_k, b_v, scale, PRECISION)
                if CHUNK % KEYS:
                    b_ds = tl.where(m_s[None, :], b_ds, 0.0)
                b_dq += tl.dot(b_ds.to(b_k.dtype), b_k, input_precision=PRECISION)
        store_rows(p_part, i_n * pairs + o_pair, m_pair, o_d, b_dq, D)


@triton.jit(do_not_specialize=["group", "groups", "first", "tokens", "keys", "lists"])
def _own_dq_kernel(
    p_q, p_k, p_v, p_do, p_lse, p_delta, p_chosen, p_part, p_dq,
    stride_b, stride_s, stride_g, scale, factor, group, groups, first, tokens, keys, lists,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, SLOTS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A tile of queries of one head: gradients through the own chunk and all slots."""
    last, m_t, o_row, i_group, o_slots = own_rows(group, groups, first, tokens, H, G, TILE)
    o_in, o_d = tl.arange(0, TILE), tl.arange(0, BLOCK_D)
    rows = _load(p_q, p_do, p_lse, p_delta, o_row, m_t, o_d, D)
    shift = i_group // G * stride_b + i_group % G * stride_g
    b_dq = tl.zeros((TILE, BLOCK_D), tl.float32)
    for i_s in range(last // CHUNK * CHUNK, last + 1, TILE):
        o_s = i_s + o_in
        b_k = finite(load_rows(p_k + shift, o_s, o_s < keys, o_d, stride_s, D))
        b_v = finite(load_rows(p_v + shift, o_s, o_s < keys, o_d, stride_s, D))
        b_ds = _dscores(rows, b_k, b_v, scale, PRECISION)
        b_ds = tl.where(o_s[None, :] <= (last + o_in)[:, None], b_ds, 0.0)
        b_dq += tl.dot(b_ds.to(b_k.dtype), b_k, input_precision=PRECISION)
    if SLOTS > 0:
        for i_slot in tl.range(0, SLOTS, loop_unroll_factor=4):
            b_chosen = tl.load(p_chosen + o_row * SLOTS + i_slot, mask=m_t, other=-1)
            m_pair = (b_chosen >= 0) & (b_chosen < lists - 1)
            b_dq += load_rows(p_part, o_slots * SLOTS + i_slot, m_pair, o_d, D, D)
    store_rows(p_dq, o_row, m_t, o_d, b_dq * factor, D)


@triton.jit
def _add_list(
    b_dk, b_dv, b_k, b_v, p_q, p_do, p_lse, p_delta, p_order, begin, end, i_group, tokens, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Adds what keys get from the pairs at places begin ... end - 1."""
    o_d = tl.arange(0, BLOCK_D)
    for i_pair in range(begin, end, TILE):
        o_place = i_pair + tl.arange(0, TILE)
        m_pair = o_place < end
        o_row = row_of(
            i_group, tl.load(p_order + o_place, mask=m_pair, other=0), tokens, H, G, SLOTS
        )
        rows = _load(p_q, p_do, p_lse, p_delta, o_row, m_pair, o_d, D)
        b_dk, b_dv = _add_keys(b_dk, b_dv, b_k, b_v, rows, m_pair, scale, True, PRECISION)
    return b_dk, b_dv


@triton.jit(do_not_specialize=["group", "tokens", "pairs", "lists", "segment"])
def _long_lists_kernel(
    p_q, p_k, p_v, p_do, p_lse, p_delta, p_chosen, p_order, p_offsets, p_more,
    stride_b, stride_s, stride_g, scale, group, tokens, pairs, lists, segment,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, SLOTS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A tile of keys and a segment of its chunk's list, not the first one: what they get of it."""
    i_n, i_more = tl.program_id(1).to(tl.int64), tl.program_id(0) // tl.cdiv(CHUNK, KEYS)
    i_group = group + i_n
    p_order += i_n * pairs
    i_chunk, begin, end = later_segment(
        (i_more + 1) * segment, p_order, p_offsets + i_n * (lists + 1), p_chosen, i_group, tokens,
        lists, segment, H, G, SLOTS,
    )  # fmt: skip
    if begin >= end:
        return
    o_in = tl.program_id(0) % tl.cdiv(CHUNK, KEYS) * KEYS + tl.arange(0, KEYS)
    o_d, m_in = tl.arange(0, BLOCK_D), o_in < CHUNK
    shift = i_group // G * stride_b + i_group % G * stride_g
    o_s = i_chunk.to(tl.int64) * CHUNK + o_in
    b_k = load_rows(p_k + shift, o_s, m_in, o_d, stride_s, D)
    b_v = load_rows(p_v + shift, o_s, m_in, o_d, stride_s, D)
    b_dk = tl.zeros((KEYS, BLOCK_D), tl.float32)
    b_dv = tl.zeros((KEYS, BLOCK_D), tl.float32)
    b_dk, b_dv = _add_list(
        b_dk, b_dv, b_k, b_v, p_q, p_do, p_lse, p_delta, p_order, begin, end, i_group, tokens,
        scale, H, G, D, SLOTS, BLOCK_D, PRECISION, TILE,
    )  # fmt: skip
    o_more = (i_n * ((pairs - 1) // segment) + i_more) * 2 * CHUNK + o_in
    store_rows(p_more, o_more, m_in, o_d, b_dk, D)
    store_rows(p_more, o_more + CHUNK, m_in, o_d, b_dv, D)


@triton.jit(do_not_specialize=["group", "first", "tokens", "keys", "pairs", "lists", "segment"])
def _keys_kernel(
    p_q, p_k, p_v, p_do, p_lse, p_delta, p_order, p_offsets, p_more, p_dk, p_dv,
    stride_b, stride_s, stride_g, scale, factor, group, first, tokens, keys, pairs, lists, segment,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, SLOTS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, KEYS: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    """A tile of keys of one chunk: gradients through its own queries and its list, written once
    (or added to those of other queries)."""
    i_chunk, i_n = tl.program_id(0) // tl.cdiv(CHUNK, KEYS), tl.program_id(1).to(tl.int64)
    i_group = group + i_n
    i_b, i_g = i_group // G, i_group % G
    o_in = tl.program_id(0) % tl.cdiv(CHUNK, KEYS) * KEYS + tl.arange(0, KEYS)
    start, o_d = i_chunk.to(tl.int64) * CHUNK, tl.arange(0, BLOCK_D)
    o_s = start + o_in
    m_s = (o_in < CHUNK) & (o_s < keys)
    shift = i_b * stride_b + i_g * stride_g
    b_k = load_rows(p_k + shift, o_s, m_s, o_d, stride_s, D)
    b_v = load_rows(p_v + shift, o_s, m_s, o_d, stride_s, D)
    b_dk = tl.zeros((KEYS, BLOCK_D), tl.float32)
    b_dv = tl.zeros((KEYS, BLOCK_D), tl.float32)
    if SLOTS > 0:
        p_offset = p_offsets + i_n * (lists + 1) + i_chunk
        begin, end = tl.load(p_offset), tl.load(p_offset + 1)
        if i_chunk < lists - 1:
            b_dk, b_dv = _add_list(
                b_dk, b_dv, b_k, b_v, p_q, p_do, p_lse, p_delta, p_order + i_n * pairs, begin,
                tl.minimum(end, begin + segment), i_group, tokens, scale,
                H, G, D, SLOTS, BLOCK_D, PRECISION, TILE,
            )  # fmt: skip
            o_more = (i_n * ((pairs - 1) // segment) + begin // segment) * 2 * CHUNK + o_in
            for _ in range(begin + segment, end, segment):
                b_dk += load_rows(p_more, o_more, m_s, o_d, D, D)
                b_dv += load_rows(p_more, o_more + CHUNK, m_s, o_d, D, D)
                o_more += 2 * CHUNK
    # Its own queries: what is not finite counts where it is read, in the log-sum-exps.
    b_k, b_v = finite(b_k), finite(b_v)
    for i_r in range(H // G):
        for i_in in range(tl.program_id(0) % tl.cdiv(CHUNK, KEYS) * KEYS, CHUNK, TILE):
            o_query = i_in + tl.arange(0, TILE)
            o_t = start + o_query - first
            m_t = (o_query < CHUNK) & (o_t >= 0) & (o_t < tokens)
            o_row = (i_b * tokens + o_t) * H + i_g * (H // G) + i_r
            b_q, b_do, b_lse, b_delta = _load(p_q, p_do, p_lse, p_delta, o_row, m_t, o_d, D)
            rows = finite(b_q), b_do, b_lse, b_delta
            m_score = (o_in[:, None] <= o_query[None, :]) & m_t[None, :]
            b_dk, b_dv = _add_keys(b_dk, b_dv, b_k, b_v, rows, m_score, scale, False, PRECISION)
    o_out, b_dk = (i_b * keys + o_s) * G + i_g, b_dk * factor
    if ADD:
        b_dk += load_rows(p_dk, o_out, m_s, o_d, D, D)
        b_dv += load_rows(p_dv, o_out, m_s, o_d, D, D)
    store_rows(p_dk, o_out, m_s, o_d, b_dk, D)
    store_rows(p_dv, o_out, m_s, o_d, b_dv, D)


def _queries(
    rows: list[Tensor], k: Tensor, v: Tensor, chosen: Tensor, lists: Lists | None, shape: Shape,
    part: range, dq: Tensor,
) -> None:  # fmt: skip
    """dq of some groups."""
    q, scale, partial = rows[0], LOG2E * shape.dim**-0.5, None
    inputs = (q, k, v, *rows[1:], chosen)
    constants = shape.constants(q, shape.slots if lists else 0)
    if lists:
        partial = q.new_empty((len(part), shape.pairs, shape.dim))
        tile, keys, launch = shape.oblong("pairs_dq", q)
        segment = tile * (TILES if shape.chunk <= keys else 1)
        _pairs_dq_kernel[(segments_of(lists, segment), len(part))](
            *inputs, *lists, partial, *shape.strides, scale, part.start, shape.tokens, shape.pairs,
            shape.chunks, segment, **constants, TILE=tile, KEYS=keys, **launch,
        )  # fmt: skip
    _, tiles, launch = shape.square("own_dq", q)
    _own_dq_kernel[(tiles * len(part) * (shape.heads // shape.groups),)](
        *inputs, partial, dq, *shape.strides, scale, shape.dim**-0.5, part.start, len(part),
        shape.first, shape.tokens, shape.keys, shape.chunks, **(constants | launch),
    )  # fmt: skip


def _keys(
    rows: list[Tensor], k: Tensor, v: Tensor, chosen: Tensor, lists: Lists | None, shape: Shape,
    part: range, dk: Tensor, dv: Tensor, add: bool,
) -> None:  # fmt: skip
    """dk and dv of some groups."""
    q, scale, more = rows[0], LOG2E * shape.dim**-0.5, None
    inputs, sizes = (q, k, v, *rows[1:]), (shape.tokens, shape.keys, shape.pairs, shape.chunks)
    constants = shape.constants(q, shape.slots if lists else 0)
    tile, keys, launch = shape.oblong("keys", q)
    constants |= {"TILE": tile, "KEYS": keys} | launch
    key_tiles, segment = ceil_div(shape.chunk, keys), max(1, shape.pairs)
    if lists:
        most = SEGMENT_BYTES // (8 * shape.chunk * shape.dim * len(part))
        segment = max(LEAST_SEGMENT, ceil_div(shape.pairs, most + 1))
        others = (shape.pairs - 1) // segment
        more = q.new_empty((len(part), others, 2, shape.chunk, shape.dim), dtype=torch.float32)
        if others:
            _long_lists_kernel[(others * key_tiles, len(part))](
                *inputs, chosen, *lists, more, *shape.strides, scale, part.start, shape.tokens,
                shape.pairs, shape.chunks, segment, **constants,
            )  # fmt: skip
    _keys_kernel[(shape.chunks * key_tiles, len(part))](
        *inputs, *(lists or (None, None)), more, dk, dv, *shape.strides, scale, shape.dim**-0.5,
        part.start, shape.first, *sizes, segment, **constants, ADD=add,
    )  # fmt: skip


def delta_of(o: Tensor, do: Tensor) -> Tensor:
    """δ [B, T, H] of o and dO [B, T, H, D], contiguous."""
    delta = o.new_empty(o.shape[:3], dtype=torch.float32)
    rows, dim = delta.numel(), o.shape[3]
    block = max(16, next_power_of_2(dim))
    tile = 2048 // block
    _delta_kernel[(ceil_div(rows, tile),)](o, do, delta, rows, D=dim, BLOCK_D=block, TILE=tile)
    return delta


def backward(
    rows: list[Tensor], k: Tensor, v: Tensor, chosen: Tensor, lists: Lists | None, shape: Shape,
    part: range, gradients: list[Tensor], add: bool,
) -> None:  # fmt: skip
    """Write the gradients of q [B, T, H, D], k and v [B, S, G, D], contiguous, of some groups.

    Args:
        rows: q and the output's gradient [B, T, H, D], log-sum-exp and δ [B, T, H] float32,
            contiguous; the rest as for `forward`.
        add: whether those of k and v come on top of what stands there, in float32.
    """
    _queries(rows, k, v, chosen, lists, shape, part, gradients[0])
    dk, dv = gradients[1:]
    _keys(rows, k, v, chosen, lists, shape, part, dk, dv, add)
