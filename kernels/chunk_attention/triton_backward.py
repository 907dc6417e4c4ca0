# mypy: allow-untyped-defs, allow-incomplete-defs
"""Gradients of the attention, recomputing the weights from the saved log-sum-exps; no atomics.

With P the weights, δ = Σ dO · O per row: dV = Pᵀ dO, dS = P ∘ (dO Vᵀ - δ), dQ = dS K, dK = dSᵀ Q.
The keys' gradients are summed per chunk, over its own queries and then over the segments of its
list; the queries' over the own chunk and then their slots: always in the same order.
Axes and names as in triton_forward.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvx_kernels.chunk_attention.triton_forward import LOG2E, Shape, finite
from rwkvx_kernels.tools.triton_lists import Lists, Tiles, pairs_of, tiles_of
from rwkvx_kernels.tools.triton_tiles import load_rows, store_rows

# Pairs of a chunk that one program goes through: a chunk that everyone reads has many programs.
SEGMENT = 1024


@triton.jit
def _load(p_q, p_do, p_lse, p_delta, o_row, m_row, o_d, D: tl.constexpr):
    """Rows of q and dO, with their log-sum-exp and δ."""
    b_q, b_do = load_rows(p_q, o_row, m_row, o_d, D, D), load_rows(p_do, o_row, m_row, o_d, D, D)
    b_lse = tl.load(p_lse + o_row, mask=m_row, other=0.0)
    b_delta = tl.load(p_delta + o_row, mask=m_row, other=0.0)
    return b_q, b_do, b_lse, b_delta


@triton.jit
def _weights(rows, b_k, b_v, m_score, scale, PRECISION: tl.constexpr):
    """P and dS of a tile, in float32; zero where not `m_score`, whatever stands there."""
    b_q, b_do, b_lse, b_delta = rows
    b_score = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
    b_p = tl.where(m_score, tl.exp2(b_score - b_lse[:, None]), 0.0)
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
    return b_p, tl.where(m_score, b_p * (b_dp - b_delta[:, None]), 0.0)


@triton.jit
def _add_keys(b_dk, b_dv, b_k, b_v, rows, m_score, scale, PRECISION: tl.constexpr):
    """Adds what the keys' and values' gradients get from a tile of rows."""
    b_q, b_do = rows[0], rows[1]
    b_p, b_ds = _weights(rows, b_k, b_v, m_score, scale, PRECISION)
    b_dk += tl.dot(tl.trans(b_ds.to(b_q.dtype)), b_q, input_precision=PRECISION)
    b_dv += tl.dot(tl.trans(b_p.to(b_do.dtype)), b_do, input_precision=PRECISION)
    return b_dk, b_dv


@triton.jit(do_not_specialize=["keys", "chunks", "total"])
def _pairs_dq_kernel(
    p_q, p_k, p_v, p_do, p_lse, p_delta, p_order, p_offsets, p_owner, p_starts, p_part,
    stride_b, stride_s, stride_g, scale, keys, chunks, total,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, SLOTS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of pairs of one chunk: the gradient of each pair's query through that chunk."""
    i_tile = tl.program_id(0)
    i_chunk = tl.load(p_owner + i_tile).to(tl.int64)
    if i_chunk >= total:
        return
    o_pair, m_pair = pairs_of(i_tile, i_chunk, p_order, p_offsets, p_starts, TILE)
    o_row, o_d = o_pair // SLOTS, tl.arange(0, BLOCK_D)
    rows = _load(p_q, p_do, p_lse, p_delta, o_row, m_pair, o_d, D)
    i_bg = i_chunk // chunks
    shift = (i_bg // G) * stride_b + (i_bg % G) * stride_g
    b_dq = tl.zeros((TILE, BLOCK_D), tl.float32)
    for i_s in range(0, CHUNK, TILE):
        o_s = (i_chunk % chunks) * CHUNK + i_s + tl.arange(0, TILE)
        b_k = load_rows(p_k + shift, o_s, o_s < keys, o_d, stride_s, D)
        b_v = load_rows(p_v + shift, o_s, o_s < keys, o_d, stride_s, D)
        _, b_ds = _weights(rows, b_k, b_v, m_pair[:, None], scale, PRECISION)
        b_dq += tl.dot(b_ds.to(b_k.dtype), b_k, input_precision=PRECISION)
    store_rows(p_part, o_pair, m_pair, o_d, b_dq, D)


@triton.jit(do_not_specialize=["first", "tokens", "keys"])
def _own_dq_kernel(
    p_q, p_k, p_v, p_do, p_lse, p_delta, p_chosen, p_part, p_dq,
    stride_b, stride_s, stride_g, scale, factor, first, tokens, keys,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, SLOTS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of queries of one head: gradients through the own chunk and all slots."""
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    start = (first // TILE + tl.program_id(0)) * TILE
    o_position, o_d = start + tl.arange(0, TILE), tl.arange(0, BLOCK_D)
    o_t = o_position - first
    m_t = (o_t >= 0) & (o_t < tokens)
    o_row = (i_b * tokens + o_t) * H + i_h
    rows = _load(p_q, p_do, p_lse, p_delta, o_row, m_t, o_d, D)
    shift = i_b * stride_b + (i_h // (H // G)) * stride_g
    b_dq = tl.zeros((TILE, BLOCK_D), tl.float32)
    for i_s in range(start // CHUNK * CHUNK, start + 1, TILE):
        o_s = i_s + tl.arange(0, TILE)
        b_k = finite(load_rows(p_k + shift, o_s, o_s < keys, o_d, stride_s, D))
        b_v = finite(load_rows(p_v + shift, o_s, o_s < keys, o_d, stride_s, D))
        m_score = (o_s[None, :] <= o_position[:, None]) & m_t[:, None]
        _, b_ds = _weights(rows, b_k, b_v, m_score, scale, PRECISION)
        b_dq += tl.dot(b_ds.to(b_k.dtype), b_k, input_precision=PRECISION)
    for i_slot in range(SLOTS):
        o_pair = o_row * SLOTS + i_slot
        m_pair = m_t & (tl.load(p_chosen + o_pair, mask=m_t, other=-1) >= 0)
        b_dq += load_rows(p_part, o_pair, m_pair, o_d, D, D)
    store_rows(p_dq, o_row, m_t, o_d, b_dq * factor, D)


@triton.jit(do_not_specialize=["keys", "chunks", "total"])
def _pairs_dkv_kernel(
    p_q, p_k, p_v, p_do, p_lse, p_delta, p_order, p_offsets, p_owner, p_starts, p_dk, p_dv,
    stride_b, stride_s, stride_g, scale, keys, chunks, total,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, SLOTS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """A segment of the list of one chunk and a tile of its keys: the segment's gradients."""
    i_segment = tl.program_id(0).to(tl.int64)
    i_chunk = tl.load(p_owner + i_segment).to(tl.int64)
    if i_chunk >= total:
        return
    begin = tl.load(p_offsets + i_chunk) + (i_segment - tl.load(p_starts + i_chunk)) * SEGMENT
    end = tl.minimum(begin + SEGMENT, tl.load(p_offsets + i_chunk + 1))
    o_in, o_d = tl.program_id(1) * TILE + tl.arange(0, TILE), tl.arange(0, BLOCK_D)
    i_bg = i_chunk // chunks
    shift = (i_bg // G) * stride_b + (i_bg % G) * stride_g
    o_s = (i_chunk % chunks) * CHUNK + o_in
    b_k = load_rows(p_k + shift, o_s, o_s < keys, o_d, stride_s, D)
    b_v = load_rows(p_v + shift, o_s, o_s < keys, o_d, stride_s, D)
    b_dk = tl.zeros((TILE, BLOCK_D), tl.float32)
    b_dv = tl.zeros((TILE, BLOCK_D), tl.float32)
    for i_pair in range(begin, end, TILE):
        o_pair = i_pair + tl.arange(0, TILE)
        m_pair = o_pair < end
        o_row = tl.load(p_order + o_pair, mask=m_pair, other=0) // SLOTS
        rows = _load(p_q, p_do, p_lse, p_delta, o_row, m_pair, o_d, D)
        b_dk, b_dv = _add_keys(b_dk, b_dv, b_k, b_v, rows, m_pair[:, None], scale, PRECISION)
    o_out = i_segment * CHUNK + o_in
    store_rows(p_dk, o_out, o_in < CHUNK, o_d, b_dk, D)
    store_rows(p_dv, o_out, o_in < CHUNK, o_d, b_dv, D)


@triton.jit(do_not_specialize=["first", "tokens", "keys", "chunks"])
def _own_dkv_kernel(
    p_q, p_k, p_v, p_do, p_lse, p_delta, p_starts, p_part_dk, p_part_dv, p_dk, p_dv,
    stride_b, stride_s, stride_g, scale, factor, first, tokens, keys, chunks,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, SLOTS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of keys: gradients through their own chunk's queries and through its segments."""
    i_bg = tl.program_id(1).to(tl.int64)
    i_b, i_g = i_bg // G, i_bg % G
    start = tl.program_id(0) * TILE
    o_s, o_d = start + tl.arange(0, TILE), tl.arange(0, BLOCK_D)
    m_s = o_s < keys
    shift = i_b * stride_b + i_g * stride_g
    b_k = finite(load_rows(p_k + shift, o_s, o_s < keys, o_d, stride_s, D))
    b_v = finite(load_rows(p_v + shift, o_s, o_s < keys, o_d, stride_s, D))
    b_dk = tl.zeros((TILE, BLOCK_D), tl.float32)
    b_dv = tl.zeros((TILE, BLOCK_D), tl.float32)
    stop = (start // CHUNK + 1) * CHUNK
    for i_r in range(H // G):
        for i_position in range(start, stop, TILE):
            o_position = i_position + tl.arange(0, TILE)
            o_t = o_position - first
            m_t = (o_t >= 0) & (o_t < tokens)
            o_row = (i_b * tokens + o_t) * H + i_g * (H // G) + i_r
            rows = _load(p_q, p_do, p_lse, p_delta, o_row, m_t, o_d, D)
            m_score = (o_s[None, :] <= o_position[:, None]) & m_t[:, None]
            b_dk, b_dv = _add_keys(b_dk, b_dv, b_k, b_v, rows, m_score, scale, PRECISION)
    if SLOTS > 0:
        p_start = p_starts + i_bg * chunks + start // CHUNK
        for i_segment in range(tl.load(p_start), tl.load(p_start + 1)):
            o_in = i_segment * CHUNK + start % CHUNK + tl.arange(0, TILE)
            b_dk += load_rows(p_part_dk, o_in, m_s, o_d, D, D)
            b_dv += load_rows(p_part_dv, o_in, m_s, o_d, D, D)
    o_out = i_bg * keys + o_s
    store_rows(p_dk, o_out, m_s, o_d, b_dk * factor, D)
    store_rows(p_dv, o_out, m_s, o_d, b_dv, D)


def backward(
    inputs: list[Tensor], k: Tensor, v: Tensor, lists: Lists, tiles: Tiles, shape: Shape
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [B, T, H, D] in the dtype of q, dk and dv [B, G, S, D] in float32.

    Args:
        inputs: q and the output's gradient [B, T, H, D], log-sum-exp and δ [B, T, H] float32, and
            the choice, contiguous; the rest as for `forward`.
    """
    q, do, lse, delta, chosen = inputs
    factor = shape.dim**-0.5
    # Products of float32 are in three pieces, which fill the registers of half as many threads.
    options = {"num_warps": 8, "num_stages": 1} if q.dtype == torch.float32 else {"num_warps": 4}
    constants, scale = shape.constants(q), LOG2E * factor
    rows = (q, k, v, do, lse, delta)
    lookup = (lists.order, lists.offsets)
    sizes = (shape.keys, shape.chunks, len(lists.offsets) - 1)
    dq = torch.empty_like(q)
    part = torch.empty((chosen.numel(), shape.dim), dtype=torch.float32, device=q.device)
    if len(tiles.owner):
        _pairs_dq_kernel[(len(tiles.owner),)](
            *rows, *lookup, *tiles, part, *shape.strides, scale, *sizes, **constants, **options
        )
    place = (shape.first, shape.tokens, shape.keys)
    _own_dq_kernel[(shape.query_tiles, shape.batch * shape.heads)](
        *rows, chosen, part, dq, *shape.strides, scale, factor, *place, **constants, **options
    )
    del part
    segments = tiles_of(lists, SEGMENT)
    part_dk, part_dv = (
        q.new_empty((len(segments.owner), shape.chunk, shape.dim), dtype=torch.float32)
        for _ in range(2)
    )
    if len(segments.owner):
        _pairs_dkv_kernel[(len(segments.owner), shape.chunk // shape.tile)](
            *rows, *lookup, segments.owner, segments.starts, part_dk, part_dv, *shape.strides,
            scale, *sizes,
            **constants, SEGMENT=SEGMENT, **(options | {"num_warps": 8}),
        )  # fmt: skip
    size = (shape.batch, shape.groups, shape.keys, shape.dim)
    dk, dv = (torch.empty(size, dtype=torch.float32, device=q.device) for _ in range(2))
    _own_dkv_kernel[(triton.cdiv(shape.keys, shape.tile), shape.batch * shape.groups)](
        *rows, segments.starts, part_dk, part_dv, dk, dv, *shape.strides, scale, factor, *place,
        shape.chunks,
        **constants, **(options | {"num_warps": 8}),
    )  # fmt: skip
    return dq, dk, dv
