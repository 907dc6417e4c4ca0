# mypy: allow-untyped-defs, allow-incomplete-defs
"""Attention to the own chunk and the chosen chunks: partial results by chunk, then one softmax.

Axes: B batch, T queries, S keys, H query heads, G key/value heads, C chunks, D head size, P pairs
of query and chunk. Names: i_ index, p_ pointer, b_ tile in registers, o_ offset, m_ mask.
Exponentials are to base 2: SCALE carries log2(e) / sqrt(D), and log-sum-exps are binary logarithms.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvx_kernels.tools.triton_lists import Lists, Tiles, pairs_of
from rwkvx_kernels.tools.triton_tiles import load_rows, precision, softmax_step, store_rows

LOG2E = math.log2(math.e)


class Shape(NamedTuple):
    """What all launches of one call share.

    Attributes:
        first: position of the first query. strides: of b, s and g in the keys and values.
        tile: queries, and keys, worked on at once: a power of two that divides the chunk.
    """

    batch: int
    tokens: int
    heads: int
    groups: int
    dim: int
    keys: int
    chunk: int
    slots: int
    first: int
    strides: tuple[int, int, int]
    tile: int

    @property
    def chunks(self) -> int:
        """Chunks of the keys, an unfinished one included."""
        return -(-self.keys // self.chunk)

    @property
    def query_tiles(self) -> int:
        """Aligned tiles that the queries lie in."""
        return (self.first + self.tokens - 1) // self.tile - self.first // self.tile + 1

    def constants(self, q: Tensor) -> dict[str, int | str]:
        """Compile-time constants that every attention kernel takes."""
        return {
            "H": self.heads,
            "G": self.groups,
            "D": self.dim,
            "SLOTS": self.slots,
            "CHUNK": self.chunk,
            "BLOCK_D": max(16, triton.next_power_of_2(self.dim)),
            "TILE": self.tile,
            "PRECISION": precision(torch.float32, q.device),
        }


def shape_of(q: Tensor, k: Tensor, chunk: int, slots: int) -> Shape:
    """Of queries [B, T, H, D], the last T of S tokens, and keys [B, S, G, D] of any strides."""
    batch, tokens, heads, dim = q.shape
    keys, groups = k.shape[1:3]
    # Products of float32 are made of three of tf32, and need more registers.
    most = (64 if dim <= 64 else 32) // (2 if q.dtype == torch.float32 else 1)
    tile, strides = math.gcd(chunk, most), (k.stride(0), k.stride(1), k.stride(2))
    first = keys - tokens
    return Shape(batch, tokens, heads, groups, dim, keys, chunk, slots, first, strides, tile)


@triton.jit
def _attend(b_q, b_k, b_v, m_score, state, scale, PRECISION: tl.constexpr):
    """One step of the running softmax over keys."""
    b_top, b_sum, b_acc = state
    b_score = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
    b_score = tl.where(m_score, b_score, float("-inf"))
    b_top, b_sum, b_acc, b_weight = softmax_step(b_top, b_sum, b_acc, b_score)
    b_acc += tl.dot(b_weight.to(b_v.dtype), b_v, input_precision=PRECISION)
    return b_top, b_sum, b_acc


@triton.jit
def start(TILE: tl.constexpr, BLOCK_D: tl.constexpr):
    """A running softmax over nothing: the largest score, the sum, the weighted values."""
    b_top = tl.full((TILE,), float("-inf"), tl.float32)
    return b_top, tl.zeros((TILE,), tl.float32), tl.zeros((TILE, BLOCK_D), tl.float32)


@triton.jit
def finite(b_x):
    """With zeros for what is not finite: a weight of zero then makes a zero of it."""
    return tl.where(tl.abs(b_x.to(tl.float32)) < float("inf"), b_x, 0.0)


@triton.jit
def _spoil(b_acc, b_k, b_v):
    """NaN from the first token on whose key or value is not finite, of queries of the same tokens:
    they read it, and no query before it."""
    b_bad = tl.where(tl.abs(b_v.to(tl.float32)) < float("inf"), 0, 1)
    b_bad_k = tl.max(tl.where(tl.abs(b_k.to(tl.float32)) < float("inf"), 0, 1), axis=1)
    b_bad = tl.maximum(b_bad, b_bad_k[:, None])
    if tl.max(tl.max(b_bad, axis=1), axis=0) > 0:
        b_acc = tl.where(tl.cumsum(b_bad, axis=0) > 0, float("nan"), b_acc)
    return b_acc


@triton.jit(do_not_specialize=["keys", "chunks"])
def _pairs_kernel(
    p_q, p_k, p_v, p_order, p_offsets, p_owner, p_starts, p_part, p_lse,
    stride_b, stride_s, stride_g, scale, keys, chunks, total,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, SLOTS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of pairs of one chunk: output and log-sum-exp of each pair."""
    i_tile = tl.program_id(0)
    i_chunk = tl.load(p_owner + i_tile).to(tl.int64)
    if i_chunk >= total:
        return
    o_pair, m_pair = pairs_of(i_tile, i_chunk, p_order, p_offsets, p_starts, TILE)
    o_row, o_d = o_pair // SLOTS, tl.arange(0, BLOCK_D)
    b_q = load_rows(p_q, o_row, m_pair, o_d, D, D)
    i_bg = i_chunk // chunks
    shift = (i_bg // G) * stride_b + (i_bg % G) * stride_g
    b_top, b_sum, b_acc = start(TILE, BLOCK_D)
    for i_s in range(0, CHUNK, TILE):
        o_s = (i_chunk % chunks) * CHUNK + i_s + tl.arange(0, TILE)
        m_s = o_s < keys
        b_k = load_rows(p_k + shift, o_s, m_s, o_d, stride_s, D)
        b_v = load_rows(p_v + shift, o_s, m_s, o_d, stride_s, D)
        state = b_top, b_sum, b_acc
        b_top, b_sum, b_acc = _attend(b_q, b_k, b_v, m_s[None, :], state, scale, PRECISION)
    store_rows(p_part, o_pair, m_pair, o_d, b_acc / b_sum[:, None], D)
    tl.store(p_lse + o_pair, b_top + tl.log2(b_sum), mask=m_pair)


@triton.jit(do_not_specialize=["first", "tokens", "keys"])
def _own_kernel(
    p_q, p_k, p_v, p_chosen, p_part, p_part_lse, p_o, p_lse,
    stride_b, stride_s, stride_g, scale, first, tokens, keys,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, SLOTS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of queries of one head: their own chunk, joined with the partial results."""
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    last = (first // TILE + tl.program_id(0)) * TILE
    o_in, o_d = tl.arange(0, TILE), tl.arange(0, BLOCK_D)
    o_t = last + o_in - first
    m_t = (o_t >= 0) & (o_t < tokens)
    o_row = (i_b * tokens + o_t) * H + i_h
    b_q = load_rows(p_q, o_row, m_t, o_d, D, D)
    shift = i_b * stride_b + (i_h // (H // G)) * stride_g
    b_top, b_sum, b_acc = start(TILE, BLOCK_D)
    for i_s in range(last // CHUNK * CHUNK, last, TILE):  # keys that every query here sees
        m_s = i_s + o_in < keys
        b_k = load_rows(p_k + shift, i_s + o_in, m_s, o_d, stride_s, D)
        b_v = load_rows(p_v + shift, i_s + o_in, m_s, o_d, stride_s, D)
        state = b_top, b_sum, b_acc
        b_top, b_sum, b_acc = _attend(b_q, b_k, b_v, m_s[None, :], state, scale, PRECISION)
    m_s = last + o_in < keys
    b_k = load_rows(p_k + shift, last + o_in, m_s, o_d, stride_s, D)
    b_v = load_rows(p_v + shift, last + o_in, m_s, o_d, stride_s, D)
    state = b_top, b_sum, _spoil(b_acc, b_k, b_v)
    b_k, b_v, m_seen = finite(b_k), finite(b_v), o_in[None, :] <= o_in[:, None]
    b_top, b_sum, b_acc = _attend(b_q, b_k, b_v, m_seen, state, scale, PRECISION)
    for i_slot in range(SLOTS):
        o_pair = o_row * SLOTS + i_slot
        m_pair = m_t & (tl.load(p_chosen + o_pair, mask=m_t, other=-1) >= 0)
        b_lse = tl.load(p_part_lse + o_pair, mask=m_pair, other=float("-inf"))
        b_part = load_rows(p_part, o_pair, m_pair, o_d, D, D)
        b_new = tl.maximum(b_top, b_lse)
        b_shrink, b_weight = tl.exp2(b_top - b_new), tl.exp2(b_lse - b_new)
        b_sum = b_sum * b_shrink + b_weight
        b_acc = b_acc * b_shrink[:, None] + b_part * b_weight[:, None]
        b_top = b_new
    store_rows(p_o, o_row, m_t, o_d, b_acc / b_sum[:, None], D)
    tl.store(p_lse + o_row, b_top + tl.log2(b_sum), mask=m_t)


def forward(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, lists: Lists, tiles: Tiles, shape: Shape
) -> tuple[Tensor, Tensor]:
    """o [B, T, H, D] in the dtype of q, and the binary log-sum-exp [B, T, H] in float32.

    Args:
        q: contiguous; k, v as `shape` describes them; chosen: [B, T, H, slots] int32.
        lists, tiles: of `chosen`, tiles of `shape.tile` pairs.
    """
    constants, scale = shape.constants(q), LOG2E * shape.dim**-0.5
    o = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    part = torch.empty((chosen.numel(), shape.dim), dtype=torch.float32, device=q.device)
    part_lse = torch.empty(chosen.numel(), dtype=torch.float32, device=q.device)
    if len(tiles.owner):
        _pairs_kernel[(len(tiles.owner),)](
            q, k, v, lists.order, lists.offsets, tiles.owner, tiles.starts, part, part_lse,
            *shape.strides, scale, shape.keys, shape.chunks, len(lists.offsets) - 1,
            **constants, num_warps=4,
        )  # fmt: skip
    _own_kernel[(shape.query_tiles, shape.batch * shape.heads)](
        q, k, v, chosen, part, part_lse, o, lse, *shape.strides, scale, shape.first, shape.tokens,
        shape.keys,
        **constants, num_warps=4,
    )  # fmt: skip
    return o, lse
