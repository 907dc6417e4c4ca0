# mypy: allow-untyped-defs, allow-incomplete-defs
"""Flat selection: chunk means are streamed past each tile of queries, which keeps a running top-k.

Axes: B batch, T queries, H query heads, G key/value heads, C chunks, D head size. Names: i_ index,
p_ pointer, b_ block, o_ offset, m_ mask. A program has `BLOCK_Q` queries of one head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvx_kernels.triton_device import device_kind

# Sorts below every chunk.
LOWEST = -0x7FFFFFFFFFFFFFFF


def exact_products(q: Tensor) -> str:
    """How products of float32 lose nothing to tensor cores: NVIDIA's take 11 bits at a time."""
    return "tf32x3" if device_kind(q.device).backend == "cuda" else "ieee"


@triton.jit
def pack(b_score, o_chunk, m_valid, LOWEST: tl.constexpr):
    """Score above, chunk below, in one integer that sorts by score and then by the lower chunk."""
    b_bits = b_score.to(tl.int32, bitcast=True)
    b_key = b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)
    b_low = (0x7FFFFFFF - o_chunk).to(tl.int64)
    b_packed = (b_key.to(tl.int64) << 32) | b_low[None, :]
    return tl.where(m_valid, b_packed, LOWEST)


@triton.jit(do_not_specialize=["first", "tokens", "chunks"])
def _select_kernel(
    p_q,
    p_means,
    p_chosen,
    first,
    tokens,
    chunks,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    LOWEST: tl.constexpr,
):
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    o_t = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_d, o_k = tl.arange(0, BLOCK_D), tl.arange(0, K)
    m_t, m_d = o_t < tokens, o_d < D
    o_row = (i_b * tokens + o_t) * H + i_h
    p_rows = p_q + o_row[:, None] * D + o_d[None, :]
    b_q = tl.load(p_rows, mask=m_t[:, None] & m_d[None, :], other=0.0).to(tl.float32)
    b_past = (first + o_t) // CHUNK
    p_means += (i_b * G + i_h // (H // G)) * chunks * D
    b_best = tl.full((BLOCK_Q, K), LOWEST, tl.int64)
    last = tl.minimum(tl.program_id(0) * BLOCK_Q + BLOCK_Q, tokens) - 1
    for i_c in range(0, (first + last) // CHUNK, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        p_tile = p_means + o_c.to(tl.int64)[None, :] * D + o_d[:, None]
        b_mean = tl.load(p_tile, mask=(o_c < chunks)[None, :] & m_d[:, None], other=0.0)
        b_score = tl.dot(b_q, b_mean, input_precision=PRECISION)
        b_packed = pack(b_score, o_c, o_c[None, :] < b_past[:, None], LOWEST)
        b_new = tl.topk(b_packed, K)
        b_best = tl.topk(tl.reshape(tl.join(b_best, b_new), (BLOCK_Q, 2 * K)), K)
    b_chunk = 0x7FFFFFFF - (b_best & 0x7FFFFFFF)
    b_chunk = tl.where(b_best == LOWEST, -1, b_chunk).to(tl.int32)
    p_out = p_chosen + o_row[:, None] * SLOTS + o_k[None, :]
    tl.store(p_out, b_chunk, mask=m_t[:, None] & (o_k < SLOTS)[None, :])


def select(q: Tensor, means: Tensor, first: int, chunk_size: int, topk: int) -> Tensor:
    """The best `topk - 1` completed past chunks of each query: [B, T, H, topk - 1] int32.

    Args:
        q: [B, T, H, D], contiguous, at positions first ... first + T - 1.
        means: [B, G, C, D] float32, contiguous, of every chunk that is complete by then.

    Returns:
        Chunk numbers, the best first; -1 where fewer past chunks exist.
    """
    batch, tokens, heads, dim = q.shape
    slots = topk - 1
    chosen = torch.empty((batch, tokens, heads, slots), dtype=torch.int32, device=q.device)
    if chosen.numel() == 0:
        return chosen
    keep = max(2, triton.next_power_of_2(slots))
    block_q = 32 if keep <= 16 else 16
    _select_kernel[(triton.cdiv(tokens, block_q), batch * heads)](
        q,
        means,
        chosen,
        first,
        tokens,
        means.shape[2],
        H=heads,
        G=means.shape[1],
        D=dim,
        SLOTS=slots,
        CHUNK=chunk_size,
        BLOCK_D=max(16, triton.next_power_of_2(dim)),
        BLOCK_Q=block_q,
        BLOCK_C=max(64, keep),
        K=keep,
        PRECISION=exact_products(q),
        LOWEST=LOWEST,
        num_warps=4 if dim <= 64 else 8,
    )
    return chosen
