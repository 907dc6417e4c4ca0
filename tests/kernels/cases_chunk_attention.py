"""What `ahead_of_time.py` compiles of chunk attention."""

import torch
from ahead_of_time import Case

from rwkvx_kernels.chunk_attention.triton_append import append
from rwkvx_kernels.chunk_attention.triton_decode import decode
from rwkvx_kernels.chunk_attention.triton_ops import attend_sequences, gradients_of_sequences

# Loads and stores; on an H200 0.83 of the forward pass's time with 8 warps.
SPILLS = {"_own_kernel": 6}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Chunk size, top k, head size, query heads, key/value heads.
SHAPES = [(16, 8, 64, 16, 16), (48, 3, 24, 16, 4), (128, 8, 64, 16, 16), (128, 8, 128, 16, 2)]
SHAPES += [(2048, 3, 64, 16, 16), (64, 33, 96, 8, 8), (32, 1, 16, 4, 4)]


def case(dtype: str, chunk: int, topk: int, dim: int, heads: int, groups: int) -> Case:
    def empty(*shape: int, dtype: torch.dtype = DTYPES[dtype]) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def call() -> None:
        q, do = empty(1, 8192, heads, dim), empty(1, 8192, heads, dim)
        k, v = empty(1, 8192, groups, dim), empty(1, 8192, groups, dim)
        chosen = empty(1, 8192, heads, topk - 1, dtype=torch.int32)
        o, lse = attend_sequences(q, k, v, chosen, chunk)
        gradients_of_sequences(do, o, lse, q, k, v, chosen, chunk)
        cached = (k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous())
        lengths = empty(1, dtype=torch.int64)
        means = empty(1, groups, 8192 // chunk, dim, dtype=torch.float32)
        append(*cached, means, k[:, :1], v[:, :1], lengths, chunk)
        picked = chosen[:, :1].reshape(heads, topk - 1) if topk > 1 else None
        decode(q[:, :1].contiguous(), *cached, picked, lengths, chunk, topk)

    name = f"{dtype} chunk {chunk} top {topk} D {dim} H {heads}/{groups}"
    return Case(name, call, quick=dtype == "bfloat16" and (chunk, topk) == (128, 8))


CASES = [case(dtype, *shape) for dtype in DTYPES for shape in SHAPES]
