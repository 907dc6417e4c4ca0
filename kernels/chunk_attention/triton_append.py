# mypy: allow-untyped-defs, allow-incomplete-defs
"""One new token for each sequence, put where a length on the device says: nothing waits for it.

Importing this module registers `torch.ops.rwkvx.chunk_attention_append_each`.
Axes: B sequences, G key/value heads, S tokens, C chunks, D head size. Names: i_ index, p_ pointer,
b_ tile in registers, o_ offset, m_ mask. A program has one head of one sequence.
"""

import triton
import triton.language as tl
from torch import Tensor

from rwkvx_kernels.tools.operators import operator
from rwkvx_kernels.tools.sizes import next_power_of_2


@triton.jit
def put(
    b_k, b_v, i_n, length, p_k, p_v, p_means, capacity, chunks,
    D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A key and a value of one head of one sequence, after `length` others; the mean of a chunk
    that is complete now. Beyond the capacity nothing is written."""
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < tl.where(length < capacity, D, 0)
    o_x = (i_n * capacity + length) * D + o_d
    tl.store(p_k + o_x, b_k, mask=m_d)
    tl.store(p_v + o_x, b_v, mask=m_d)
    if (length + 1) % CHUNK == 0:
        # The last key is at hand; what was just stored is not read again.
        p_chunk = p_k + (i_n * capacity + length + 1 - CHUNK) * D
        b_sum = b_k.to(tl.float32)
        for i_s in range(0, CHUNK - 1, TILE):
            o_s = i_s + tl.arange(0, TILE)
            m_x = (o_s < CHUNK - 1)[:, None] & m_d[None, :]
            b_x = tl.load(p_chunk + o_s[:, None] * D + o_d[None, :], mask=m_x, other=0.0)
            b_sum += tl.sum(b_x.to(tl.float32), axis=0)
        # As `chunk_select.common.chunk_means`: what is not finite counts for nothing.
        b_mean = tl.where(tl.abs(b_sum) < float("inf"), b_sum / CHUNK, 0.0)
        tl.store(p_means + (i_n * chunks + length // CHUNK) * D + o_d, b_mean, mask=m_d)


@triton.jit(do_not_specialize=["capacity", "chunks"])
def _append_kernel(
    p_new_k, p_new_v, p_k, p_v, p_means, p_lengths,
    capacity, chunks,
    G: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0).to(tl.int64)
    length = tl.load(p_lengths + i_n // G)
    o_x = i_n * D + tl.arange(0, BLOCK_D)
    m_x = tl.arange(0, BLOCK_D) < D
    b_k = tl.load(p_new_k + o_x, mask=m_x, other=0.0)
    b_v = tl.load(p_new_v + o_x, mask=m_x, other=0.0)
    put(b_k, b_v, i_n, length, p_k, p_v, p_means, capacity, chunks, D, CHUNK, BLOCK_D, TILE)


def append(
    cached_k: Tensor,
    cached_v: Tensor,
    means: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    chunk_size: int,
) -> None:
    """Write k, v [B, 1, G, D] after the first `lengths` [B] int64 tokens of each sequence.

    Args:
        cached_k, cached_v: [B, G, S, D], contiguous. Beyond S nothing is written.
        means: [B, G, C, D] float32, contiguous; gets the mean of a chunk that becomes complete.
    """
    batch, groups, capacity, dim = cached_k.shape
    _append_kernel[(batch * groups,)](
        k.contiguous(), v.contiguous(), cached_k, cached_v, means, lengths, capacity,
        means.shape[2],
        G=groups, D=dim, CHUNK=chunk_size, BLOCK_D=max(16, next_power_of_2(dim)),
        TILE=min(64, next_power_of_2(chunk_size)), num_warps=4,
    )  # fmt: skip


append_each = operator(
    "chunk_attention_append_each", lambda *_: None, mutates=("cached_k", "cached_v", "means")
)(append)
