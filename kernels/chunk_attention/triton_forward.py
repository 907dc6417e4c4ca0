# mypy: allow-untyped-defs, allow-incomplete-defs
"""Attention to the own chunk and the chosen chunks: partial results by chunk, then one softmax.

Axes: B batch, T queries, S keys, H query heads, G key/value heads, C chunks, D head size, P pairs
of query and chunk. Names: i_ index, p_ pointer, b_ block, o_ offset, m_ mask. Exponentials are to
base 2: SCALE carries log2(e) / sqrt(D), and log-sum-exps are binary logarithms.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvx_kernels.chunk_attention.triton_pairs import Blocks, Lists, pairs_of
from rwkvx_kernels.chunk_attention.triton_select import exact_products

LOG2E = math.log2(math.e)


class Shape(NamedTuple):
    """What all launches of one call share.

    Attributes:
        first: position of the first query. strides: of b, s and g in the keys and values.
        tile: queries, and keys, of a block: powers of two that divide the chunk.
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

    def constants(self, q: Tensor) -> dict[str, int | str]:
        """Compile-time constants that every attention kernel takes."""
        return {
            "H": self.heads,
            "G": self.groups,
            "D": self.dim,
            "SLOTS": self.slots,
            "CHUNK": self.chunk,
            "BLOCK_D": max(16, triton.next_power_of_2(self.dim)),
            "BLOCK": self.tile,
            "PRECISION": exact_products(q),
        }


def shape_of(q: Tensor, k: Tensor, layout: str, chunk: int, topk: int, first: int) -> Shape:
    """`layout` names the axes of k and v: "bsgd" or "bgsd"."""
    batch, tokens, heads, dim = q.shape
    strides = (k.stride(0), k.stride(layout.index("s")), k.stride(layout.index("g")))
    groups, keys = k.shape[layout.index("g")], first + tokens
    # Products of float32 are made of three of tf32, and need more registers.
    most = (64 if dim <= 64 else 32) // (2 if q.dtype == torch.float32 else 1)
    tile = math.gcd(chunk, most)
    return Shape(batch, tokens, heads, groups, dim, keys, chunk, topk - 1, first, strides, tile)


@triton.jit
def load_keys(p_x, o_s, o_d, stride, keys, D: tl.constexpr):
    """Rows o_s of the keys or values that p_x points to: [BLOCK, BLOCK_D], zeros beyond the end."""
    m_x = (o_s < keys)[:, None] & (o_d < D)[None, :]
    return tl.load(p_x + o_s.to(tl.int64)[:, None] * stride + o_d[None, :], mask=m_x, other=0.0)


@triton.jit
def load_rows(p_x, o_row, m_row, o_d, D: tl.constexpr):
    """Rows o_row of a [B, T, H, D] tensor: [BLOCK, BLOCK_D]."""
    m_x = m_row[:, None] & (o_d < D)[None, :]
    return tl.load(p_x + o_row[:, None] * D + o_d[None, :], mask=m_x, other=0.0)


@triton.jit
def store_rows(p_x, o_row, m_row, o_d, b_x, D: tl.constexpr):
    """The inverse of `load_rows`."""
    m_x = m_row[:, None] & (o_d < D)[None, :]
    tl.store(p_x + o_row[:, None] * D + o_d[None, :], b_x.to(p_x.dtype.element_ty), mask=m_x)


@triton.jit
def _attend(b_q, b_k, b_v, m_score, b_top, b_sum, b_acc, scale, PRECISION: tl.constexpr):
    """One step of the running softmax over keys."""
    b_score = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
    b_score = tl.where(m_score, b_score, float("-inf"))
    b_new = tl.maximum(b_top, tl.max(b_score, axis=1))
    b_shrink = tl.exp2(b_top - b_new)
    b_weight = tl.exp2(b_score - b_new[:, None])
    b_sum = b_sum * b_shrink + tl.sum(b_weight, axis=1)
    b_acc = b_acc * b_shrink[:, None]
    b_acc += tl.dot(b_weight.to(b_v.dtype), b_v, input_precision=PRECISION)
    return b_new, b_sum, b_acc


@triton.jit(do_not_specialize=["keys", "chunks"])
def _pairs_kernel(
    p_q,
    p_k,
    p_v,
    p_order,
    p_offsets,
    p_owner,
    p_starts,
    p_part,
    p_lse,
    stride_b,
    stride_s,
    stride_g,
    scale,
    keys,
    chunks,
    total,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A block of pairs of one chunk: output and log-sum-exp of each pair."""
    i_block = tl.program_id(0)
    i_chunk = tl.load(p_owner + i_block).to(tl.int64)
    if i_chunk >= total:
        return
    o_pair, m_pair = pairs_of(i_block, i_chunk, p_order, p_offsets, p_starts, BLOCK)
    o_row, o_d = o_pair // SLOTS, tl.arange(0, BLOCK_D)
    b_q = load_rows(p_q, o_row, m_pair, o_d, D)
    i_bg = i_chunk // chunks
    shift = (i_bg // G) * stride_b + (i_bg % G) * stride_g
    start = (i_chunk % chunks) * CHUNK
    b_top = tl.full((BLOCK,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK,), tl.float32)
    b_acc = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for i_s in range(0, CHUNK, BLOCK):
        o_s = start + i_s + tl.arange(0, BLOCK)
        b_k = load_keys(p_k + shift, o_s, o_d, stride_s, keys, D)
        b_v = load_keys(p_v + shift, o_s, o_d, stride_s, keys, D)
        b_top, b_sum, b_acc = _attend(
            b_q, b_k, b_v, (o_s < keys)[None, :], b_top, b_sum, b_acc, scale, PRECISION
        )
    store_rows(p_part, o_pair, m_pair, o_d, b_acc / b_sum[:, None], D)
    tl.store(p_lse + o_pair, b_top + tl.log2(b_sum), mask=m_pair)


@triton.jit(do_not_specialize=["first", "tokens", "keys"])
def _own_kernel(
    p_q,
    p_k,
    p_v,
    p_chosen,
    p_part,
    p_part_lse,
    p_o,
    p_lse,
    stride_b,
    stride_s,
    stride_g,
    scale,
    first,
    tokens,
    keys,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A block of queries of one head: their own chunk, joined with the partial results."""
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    o_position = (first // BLOCK + tl.program_id(0)) * BLOCK + tl.arange(0, BLOCK)
    o_t, o_d = o_position - first, tl.arange(0, BLOCK_D)
    m_t = (o_t >= 0) & (o_t < tokens)
    o_row = (i_b * tokens + o_t) * H + i_h
    b_q = load_rows(p_q, o_row, m_t, o_d, D)
    shift = i_b * stride_b + (i_h // (H // G)) * stride_g
    last = (first // BLOCK + tl.program_id(0)) * BLOCK
    b_top = tl.full((BLOCK,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK,), tl.float32)
    b_acc = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for i_s in range(last // CHUNK * CHUNK, last + 1, BLOCK):
        o_s = i_s + tl.arange(0, BLOCK)
        b_k = load_keys(p_k + shift, o_s, o_d, stride_s, keys, D)
        b_v = load_keys(p_v + shift, o_s, o_d, stride_s, keys, D)
        m_score = o_s[None, :] <= o_position[:, None]
        b_top, b_sum, b_acc = _attend(b_q, b_k, b_v, m_score, b_top, b_sum, b_acc, scale, PRECISION)
    for i_slot in range(SLOTS):
        o_pair = o_row * SLOTS + i_slot
        m_pair = m_t & (tl.load(p_chosen + o_pair, mask=m_t, other=-1) >= 0)
        b_lse = tl.load(p_part_lse + o_pair, mask=m_pair, other=float("-inf"))
        b_part = load_rows(p_part, o_pair, m_pair, o_d, D)
        b_new = tl.maximum(b_top, b_lse)
        b_shrink, b_weight = tl.exp2(b_top - b_new), tl.exp2(b_lse - b_new)
        b_sum = b_sum * b_shrink + b_weight
        b_acc = b_acc * b_shrink[:, None] + b_part * b_weight[:, None]
        b_top = b_new
    store_rows(p_o, o_row, m_t, o_d, b_acc / b_sum[:, None], D)
    tl.store(p_lse + o_row, b_top + tl.log2(b_sum), mask=m_t)


def forward(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, lists: Lists, blocks: Blocks, shape: Shape
) -> tuple[Tensor, Tensor]:
    """o [B, T, H, D] in the dtype of q, and the binary log-sum-exp [B, T, H] in float32.

    Args:
        q: contiguous; k, v as `shape` describes them; chosen: [B, T, H, slots] int32.
        lists, blocks: of `chosen`, blocks of `shape.tile` pairs.
    """
    constants, scale = shape.constants(q), LOG2E * shape.dim**-0.5
    o = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    part = torch.empty((chosen.numel(), shape.dim), dtype=torch.float32, device=q.device)
    part_lse = torch.empty(chosen.numel(), dtype=torch.float32, device=q.device)
    if len(blocks.owner):
        _pairs_kernel[(len(blocks.owner),)](
            q,
            k,
            v,
            lists.order,
            lists.offsets,
            blocks.owner,
            blocks.starts,
            part,
            part_lse,
            *shape.strides,
            scale,
            shape.keys,
            shape.chunks,
            len(lists.offsets) - 1,
            **constants,
            num_warps=4,
        )
    tiles = (shape.first + shape.tokens - 1) // shape.tile - shape.first // shape.tile + 1
    _own_kernel[(tiles, shape.batch * shape.heads)](
        q,
        k,
        v,
        chosen,
        part,
        part_lse,
        o,
        lse,
        *shape.strides,
        scale,
        shape.first,
        shape.tokens,
        shape.keys,
        **constants,
        num_warps=4,
    )
    return o, lse
