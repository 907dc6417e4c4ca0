# mypy: allow-untyped-defs, allow-incomplete-defs
"""Means of completed chunks (`common.chunk_means`) in one launch.

Axes: B batch, S keys, G key/value heads, C chunks, D head size. Names: i_ index, p_ pointer, b_
tile in registers, o_ offset, m_ mask. A program has one chunk.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvx_kernels.chunk_select.options import TABLE
from rwkvx_kernels.tools.sizes import next_power_of_2
from rwkvx_kernels.tools.triton_options import options_for
from rwkvx_kernels.tools.triton_tiles import load_rows, store


@triton.jit(do_not_specialize=["chunks"])
def _means_kernel(
    p_k, p_means, stride_b, stride_s, stride_g, chunks,
    G: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    i_x = tl.program_id(0).to(tl.int64)
    i_n, i_chunk = i_x // chunks, i_x % chunks
    o_in, o_d = tl.arange(0, TILE), tl.arange(0, BLOCK_D)
    p_k += i_n // G * stride_b + i_n % G * stride_g + i_chunk * CHUNK * stride_s
    b_sum = tl.zeros((BLOCK_D,), tl.float32)
    for i_s in range(0, CHUNK, TILE):
        b_k = load_rows(p_k, i_s + o_in, i_s + o_in < CHUNK, o_d, stride_s, D)
        b_sum += tl.sum(b_k.to(tl.float32), axis=0)
    # What is not finite counts for nothing.
    b_mean = tl.where(tl.abs(b_sum) < float("inf"), b_sum / CHUNK, 0.0)
    store(p_means, i_x * D + o_d, b_mean, o_d < D)


def means_of(k: Tensor, chunk_size: int) -> Tensor:
    """[B, S, G, D], of any strides but for D, -> [B, G, S // chunk_size, D] float32."""
    batch, keys, groups, dim = k.shape
    chunks = keys // chunk_size
    means = torch.empty((batch, groups, chunks, dim), dtype=torch.float32, device=k.device)
    if means.numel() == 0:
        return means
    options = options_for(TABLE, "means", k.dtype, dim, k.device)
    _means_kernel[(batch * groups * chunks,)](
        k, means, k.stride(0), k.stride(1), k.stride(2), chunks,
        G=groups, D=dim, CHUNK=chunk_size, BLOCK_D=max(16, next_power_of_2(dim)),
        TILE=min(options.rows, next_power_of_2(chunk_size)), **options.launch,
    )  # fmt: skip
    return means
