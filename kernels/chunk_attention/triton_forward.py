# mypy: allow-untyped-defs, allow-incomplete-defs
"""Attention to the own chunk and the chosen chunks: partial results by chunk, then one softmax.

Axes: B batch, T queries, S keys, H query heads, G key/value heads, N groups (b · G + g) of a part,
R query heads of a group, D head size, P pairs of query and chunk of a group, in the order of their
numbers (t · R + r) · slots + slot. Names: i_ index, p_ pointer, b_ tile in registers, o_ offset,
m_ mask. Exponentials are to base 2: `scale` carries log2(e) / sqrt(D), and log-sum-exps are binary
logarithms.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvx_kernels.chunk_attention.options import TABLE
from rwkvx_kernels.tools.sizes import next_power_of_2
from rwkvx_kernels.tools.triton_lists import Lists, row_of, segment_of, segments_of
from rwkvx_kernels.tools.triton_options import Options, options_for
from rwkvx_kernels.tools.triton_tiles import (
    finite,
    load_rows,
    precision,
    softmax_step,
    store_rows,
)

LOG2E = math.log2(math.e)
# Tiles of pairs of a chunk that one program goes through, where the chunk stays in fast memory.
TILES = 4


class Shape(NamedTuple):
    """What all launches of one call share.

    Attributes:
        first: position of the first query. strides: of b, s and g in the keys and values.
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

    @property
    def chunks(self) -> int:
        """Chunks of the keys, the last one included, which no query can have chosen."""
        return -(-self.keys // self.chunk)

    @property
    def pairs(self) -> int:
        """Pairs of a group, empty ones included; none where there is no past chunk."""
        slots = self.slots if self.chunks > 1 else 0
        return self.tokens * (self.heads // self.groups) * slots

    def options(self, stage: str, q: Tensor) -> Options:
        """From the table, for q."""
        return options_for(TABLE, stage, q.dtype, self.dim, q.device)

    def oblong(self, stage: str, q: Tensor) -> tuple[int, int, dict[str, int]]:
        """Pairs and keys of a tile, and arguments of the launch."""
        options = self.options(stage, q)
        return options.rows, min(options.columns, _power(self.chunk)), options.launch

    def square(self, stage: str, q: Tensor) -> tuple[int, int, dict[str, Any]]:
        """Rows and columns of a square tile that divides the chunk, how many of them the queries
        lie in, and arguments of the launch with the constants that depend on it."""
        options = self.options(stage, q)
        tile = math.gcd(self.chunk, options.rows)
        tiles = (self.first + self.tokens - 1) // tile - self.first // tile + 1
        launch: dict[str, Any] = {**options.launch, "TILE": tile}
        if stage == "own_dq" and q.dtype == torch.float32 and self.dim > 64:
            # Three parts of keys and values fill the registers.
            launch["PRECISION"] = "ieee"
        return tile, tiles, launch

    def constants(self, q: Tensor, slots: int | None = None) -> dict[str, int | str]:
        """Compile-time constants that every attention kernel takes."""
        return {
            "H": self.heads,
            "G": self.groups,
            "D": self.dim,
            "SLOTS": self.slots if slots is None else slots,
            "CHUNK": self.chunk,
            "BLOCK_D": _power(self.dim),
            "PRECISION": precision(torch.float32, q.device),
        }


def _power(size: int) -> int:
    """What a dimension of a matrix product takes: a power of two, 16 or more."""
    return max(16, next_power_of_2(size))


def shape_of(q: Tensor, k: Tensor, chunk: int, slots: int) -> Shape:
    """Of queries [B, T, H, D], the last T of S tokens, and keys [B, S, G, D] of any strides."""
    batch, tokens, heads, dim = q.shape
    keys, groups = k.shape[1:3]
    strides = (k.stride(0), k.stride(1), k.stride(2))
    return Shape(batch, tokens, heads, groups, dim, keys, chunk, slots, keys - tokens, strides)


@triton.jit
def attend(b_q, b_k, b_v, m_score, state, scale, PRECISION: tl.constexpr):
    """One step of the running softmax over keys."""
    b_top, b_sum, b_acc = state
    b_score = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
    b_score = tl.where(m_score, b_score, float("-inf"))
    b_top, b_sum, b_acc, b_weight = softmax_step(b_top, b_sum, b_acc, b_score)
    b_acc += tl.dot(b_weight.to(b_v.dtype), b_v, input_precision=PRECISION)
    return b_top, b_sum, b_acc


@triton.jit
def attend_whole(b_q, b_k, b_v, m_s, scale, ALL: tl.constexpr, PRECISION: tl.constexpr):
    """The softmax over all keys at once; all of them count, or those of the mask."""
    b_score = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    if not ALL:
        b_score = tl.where(m_s[None, :], b_score, float("-inf"))
    b_top = tl.max(b_score, axis=1) * scale
    b_weight = tl.exp2(b_score * scale - b_top[:, None])
    b_sum = tl.sum(b_weight, axis=1)
    return b_top, b_sum, tl.dot(b_weight.to(b_v.dtype), b_v, input_precision=PRECISION)


@triton.jit
def start(TILE: tl.constexpr, BLOCK_D: tl.constexpr):
    """A running softmax over nothing: the largest score, the sum, the weighted values."""
    b_top = tl.full((TILE,), float("-inf"), tl.float32)
    return b_top, tl.zeros((TILE,), tl.float32), tl.zeros((TILE, BLOCK_D), tl.float32)


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


@triton.jit(do_not_specialize=["group", "tokens", "pairs", "lists", "segment"])
def _pairs_kernel(
    p_q, p_k, p_v, p_chosen, p_order, p_offsets, p_part, p_lse,
    stride_b, stride_s, stride_g, scale, group, tokens, pairs, lists, segment,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, SLOTS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A segment of the pairs of one chunk: output and log-sum-exp of each pair."""
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
    if CHUNK <= KEYS:
        m_s = o_key < CHUNK
        b_k = load_rows(p_k + shift, o_key, m_s, o_d, stride_s, D)
        b_v = load_rows(p_v + shift, o_key, m_s, o_d, stride_s, D)
    for i_pair in range(begin, end, TILE):
        o_place = i_pair + tl.arange(0, TILE)
        m_pair = o_place < end
        o_pair = tl.load(p_order + o_place, mask=m_pair, other=0)
        o_row = row_of(i_group, o_pair, tokens, H, G, SLOTS)
        b_q = load_rows(p_q, o_row, m_pair, o_d, D, D)
        if CHUNK <= KEYS:
            b_top, b_sum, b_acc = attend_whole(b_q, b_k, b_v, m_s, scale, CHUNK == KEYS, PRECISION)
        else:
            b_top, b_sum, b_acc = start(TILE, BLOCK_D)
            for i_s in range(0, CHUNK, KEYS):
                m_s = i_s + o_key < CHUNK
                b_k = load_rows(p_k + shift, i_s + o_key, m_s, o_d, stride_s, D)
                b_v = load_rows(p_v + shift, i_s + o_key, m_s, o_d, stride_s, D)
                state = b_top, b_sum, b_acc
                b_top, b_sum, b_acc = attend(b_q, b_k, b_v, m_s[None, :], state, scale, PRECISION)
        o_part = i_n * pairs + o_pair
        store_rows(p_part, o_part, m_pair, o_d, b_acc / b_sum[:, None], D)
        tl.store(p_lse + o_part, b_top + tl.log2(b_sum), mask=m_pair)


@triton.jit
def own_rows(
    group, groups, first, tokens,
    H: tl.constexpr, G: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A program's tile of queries of one head: the position where it starts, which queries there
    are, their rows, the group in all and in the part, and their first pair over the slots."""
    heads = groups * (H // G)
    start, i_head = (first // TILE + tl.program_id(0) // heads) * TILE, tl.program_id(0) % heads
    i_n, i_r = (i_head // (H // G)).to(tl.int64), i_head % (H // G)
    i_group = group + i_n
    o_t = start + tl.arange(0, TILE) - first
    m_t = (o_t >= 0) & (o_t < tokens)
    o_row = (i_group // G * tokens + o_t) * H + i_group % G * (H // G) + i_r
    o_pair = (i_n * tokens + o_t) * (H // G) + i_r
    return start, m_t, o_row, i_group, o_pair


@triton.jit(do_not_specialize=["group", "groups", "first", "tokens", "keys", "lists"])
def _own_kernel(
    p_q, p_k, p_v, p_chosen, p_part, p_part_lse, p_o, p_lse,
    stride_b, stride_s, stride_g, scale, group, groups, first, tokens, keys, lists,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, SLOTS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A tile of queries of one head: their own chunk, joined with the partial results."""
    last, m_t, o_row, i_group, o_slots = own_rows(group, groups, first, tokens, H, G, TILE)
    o_in, o_d = tl.arange(0, TILE), tl.arange(0, BLOCK_D)
    b_q = load_rows(p_q, o_row, m_t, o_d, D, D)
    shift = i_group // G * stride_b + i_group % G * stride_g
    b_top, b_sum, b_acc = start(TILE, BLOCK_D)
    for i_s in range(last // CHUNK * CHUNK, last, TILE):  # keys that every query here sees
        m_s = i_s + o_in < keys
        b_k = load_rows(p_k + shift, i_s + o_in, m_s, o_d, stride_s, D)
        b_v = load_rows(p_v + shift, i_s + o_in, m_s, o_d, stride_s, D)
        state = b_top, b_sum, b_acc
        b_top, b_sum, b_acc = attend(b_q, b_k, b_v, m_s[None, :], state, scale, PRECISION)
    m_s = last + o_in < keys
    b_k = load_rows(p_k + shift, last + o_in, m_s, o_d, stride_s, D)
    b_v = load_rows(p_v + shift, last + o_in, m_s, o_d, stride_s, D)
    state = b_top, b_sum, _spoil(b_acc, b_k, b_v)
    b_k, b_v, m_seen = finite(b_k), finite(b_v), o_in[None, :] <= o_in[:, None]
    b_top, b_sum, b_acc = attend(b_q, b_k, b_v, m_seen, state, scale, PRECISION)
    if SLOTS > 0:
        for i_slot in tl.range(0, SLOTS, loop_unroll_factor=4):
            b_chosen = tl.load(p_chosen + o_row * SLOTS + i_slot, mask=m_t, other=-1)
            m_pair = (b_chosen >= 0) & (b_chosen < lists - 1)
            o_pair = o_slots * SLOTS + i_slot
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
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, lists: Lists | None, shape: Shape,
    part: range, o: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """Write o [B, T, H, D] in the dtype of q, and the binary log-sum-exp [B, T, H] in float32.

    Args:
        q: contiguous; k, v as `shape` describes them; chosen: [B, T, H, slots], contiguous.
        lists: of `chosen` in these groups; None if there is no past chunk. part: groups to do.
    """
    scale, partial, partial_lse = LOG2E * shape.dim**-0.5, None, None
    constants = shape.constants(q, shape.slots if lists else 0)
    if lists:
        partial = q.new_empty((len(part), shape.pairs, shape.dim))
        partial_lse = q.new_empty((len(part), shape.pairs), dtype=torch.float32)
        tile, keys, launch = shape.oblong("pairs", q)
        segment = tile * (TILES if shape.chunk <= keys else 1)
        _pairs_kernel[(segments_of(lists, segment), len(part))](
            q, k, v, chosen, *lists, partial, partial_lse, *shape.strides, scale, part.start,
            shape.tokens, shape.pairs, shape.chunks, segment,
            **constants, TILE=tile, KEYS=keys, **launch,
        )  # fmt: skip
    _, tiles, launch = shape.square("own", q)
    _own_kernel[(tiles * len(part) * (shape.heads // shape.groups),)](
        q, k, v, chosen, partial, partial_lse, o, lse, *shape.strides, scale, part.start,
        len(part), shape.first, shape.tokens, shape.keys, shape.chunks, **(constants | launch),
    )  # fmt: skip
