# mypy: allow-untyped-defs, allow-incomplete-defs
"""One or a few new tokens attend chosen chunks of long caches of unequal length, one by one.

Axes: B sequences, T queries, H query heads, G key/value heads, C chunks, D head size; a row is one
head of one query. Names: i_ index, p_ pointer, b_ tile in registers, o_ offset, m_ mask.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvx_kernels.chunk_attention.triton_forward import LOG2E
from rwkvx_kernels.chunk_select.triton_decode import LOWEST, best_of, kept_of_split
from rwkvx_kernels.tools.sizes import ceil_div, next_power_of_2
from rwkvx_kernels.tools.triton_device import device_kind
from rwkvx_kernels.tools.triton_overlap import overlapping, wait_for_launches
from rwkvx_kernels.tools.triton_tiles import load, store

TILE = 64  # keys at once


@triton.jit(do_not_specialize=["tokens", "ahead", "candidates"])
def _part_kernel(
    p_q, p_k, p_v, p_lengths, p_chosen, p_part, p_lse,
    stride_b, stride_s, stride_g, scale, tokens, ahead, candidates,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, SLOTS: tl.constexpr, CHUNK: tl.constexpr,
    PIECE: tl.constexpr, PIECES: tl.constexpr, K: tl.constexpr, LOWEST: tl.constexpr,
    BLOCK_D: tl.constexpr, TILE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A piece of one chunk of one row, of the own chunk in the last slot: output and binary
    log-sum-exp. With K, who chose left the joining of its splits to every program."""
    wait_for_launches(OVERLAP)
    i_row, i_slot = tl.program_id(0).to(tl.int64), tl.program_id(1) // PIECES
    i_b, i_t, i_h = i_row // H // tokens, i_row // H % tokens, i_row % H
    position = tl.load(p_lengths + i_b) + ahead + i_t
    i_chunk = position // CHUNK
    # Without slots there is no list: a load from it would not compile.
    if SLOTS > 0:  # noqa: SIM102
        if i_slot < SLOTS:
            if K > 0:
                p_best = p_chosen + i_row * candidates
                b_best = best_of(p_best, candidates, K, 4 * K, LOWEST)
                m_slot = (tl.arange(0, K) == K - 1 - i_slot)[None, :]  # the best come last
                i_chunk = tl.sum(tl.where(m_slot, b_best, 0)).to(tl.int64)
            else:
                i_chunk = tl.load(p_chosen + i_row * SLOTS + i_slot).to(tl.int64)
    o_part = i_row * ((SLOTS + 1) * PIECES) + tl.program_id(1)
    start = i_chunk * CHUNK + tl.program_id(1) % PIECES * PIECE
    stop = tl.minimum(tl.minimum(start + PIECE, (i_chunk + 1) * CHUNK), position + 1)
    if (i_chunk < 0) | (start >= stop):
        tl.store(p_lse + o_part, float("-inf"))
        return
    o_d = tl.arange(0, BLOCK_D)
    b_q = load(p_q, i_row * D + o_d, o_d < D)
    shift = i_b * stride_b + (i_h // (H // G)) * stride_g
    b_top = tl.full((1,), float("-inf"), tl.float32)
    b_sum = tl.zeros((1,), tl.float32)
    b_acc = tl.zeros((BLOCK_D,), tl.float32)
    for i_s in range(start, stop, TILE):
        o_s = i_s + tl.arange(0, TILE)
        m_x = (o_s < stop)[:, None] & (o_d < D)[None, :]
        o_x = shift + o_s[:, None] * stride_s + o_d[None, :]
        b_k, b_v = load(p_k, o_x, m_x), load(p_v, o_x, m_x)
        b_score = tl.where(o_s < stop, tl.sum(b_k * b_q[None, :], axis=1) * scale, float("-inf"))
        b_new = tl.maximum(b_top, tl.max(b_score, axis=0))
        b_weight, b_shrink = tl.exp2(b_score - b_new), tl.exp2(b_top - b_new)
        b_sum = b_sum * b_shrink + tl.sum(b_weight, axis=0)
        b_acc = b_acc * b_shrink + tl.sum(b_v * b_weight[:, None], axis=0)
        b_top = b_new
    tl.store(p_part + o_part * D + o_d, b_acc / b_sum, mask=o_d < D)
    tl.store(p_lse + o_part + tl.arange(0, 1), b_top + tl.log2(b_sum))


@triton.jit
def _join_kernel(
    p_part, p_lse, p_o, D: tl.constexpr, PARTS: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One softmax over the parts of a row."""
    wait_for_launches(OVERLAP)
    i_row = tl.program_id(0).to(tl.int64)
    o_p, o_d = i_row * PARTS + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D)
    m_p = tl.arange(0, BLOCK_P) < PARTS
    b_lse = tl.load(p_lse + o_p, mask=m_p, other=float("-inf"))
    m_p = b_lse != float("-inf")
    b_weight = tl.exp2(b_lse - tl.max(b_lse, axis=0))
    m_x = m_p[:, None] & (o_d < D)[None, :]
    b_part = tl.load(p_part + o_p[:, None] * D + o_d[None, :], mask=m_x, other=0.0)
    b_o = tl.sum(b_part * b_weight[:, None], axis=0) / tl.sum(b_weight, axis=0)
    store(p_o, i_row * D + o_d, b_o, o_d < D)


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor | None,
    lengths: Tensor,
    chunk_size: int,
    topk: int,
    counted: bool = True,
) -> Tensor:
    """o [B, T, H, D] of the last T tokens of each sequence; no gradient.

    Args:
        q: [B, T, H, D], contiguous, of any dtype. k, v: [B, G, S, D] with room for S tokens.
        chosen: [B·T·H, topk - 1] int32, -1 for none; None if topk is 1. Or, int64, what each split
            of the chunks kept, packed (chunk_select/triton_decode.py).
        lengths: [B] int64, tokens of each sequence; the T new ones included where `counted`.
    """
    batch, tokens, heads, dim = q.shape
    rows, block_d = batch * tokens * heads, max(16, next_power_of_2(dim))
    tile = min(TILE, next_power_of_2(chunk_size))
    pieces = 4 * device_kind(q.device).processors // max(1, rows * topk)
    pieces = max(1, min(pieces, ceil_div(chunk_size, TILE)))
    piece = ceil_div(ceil_div(chunk_size, pieces), tile) * tile
    pieces = ceil_div(chunk_size, piece)
    parts = topk * pieces
    part = torch.empty((rows, parts, dim), dtype=torch.float32, device=q.device)
    lse = torch.empty((rows, parts), dtype=torch.float32, device=q.device)
    packed = chosen is not None and chosen.dtype == torch.int64
    _part_kernel[(rows, parts)](
        q, k, v, lengths, chosen, part, lse, k.stride(0), k.stride(2), k.stride(1),
        LOG2E * dim**-0.5, tokens, -tokens if counted else 0,
        0 if chosen is None else chosen.shape[1],
        H=heads, G=k.shape[1], D=dim, CHUNK=chunk_size, SLOTS=topk - 1, BLOCK_D=block_d,
        PIECE=piece, PIECES=pieces, K=kept_of_split(topk - 1) if packed else 0, LOWEST=LOWEST,
        TILE=tile, num_warps=4, **overlapping(q.device),
    )  # fmt: skip
    o = torch.empty_like(q)
    block_p = next_power_of_2(parts)
    _join_kernel[(rows,)](
        part, lse, o, D=dim, PARTS=parts, BLOCK_D=block_d, BLOCK_P=block_p, **overlapping(q.device)
    )
    return o
