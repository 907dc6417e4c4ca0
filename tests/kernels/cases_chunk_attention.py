"""What `ahead_of_time.py` compiles of chunk attention."""

import torch
from ahead_of_time import Case

from rwkvx_kernels.chunk_attention.forest import room_for
from rwkvx_kernels.chunk_attention.tree import DENSE_NODES, FANOUT
from rwkvx_kernels.chunk_attention.triton_append import append
from rwkvx_kernels.chunk_attention.triton_backward import backward
from rwkvx_kernels.chunk_attention.triton_decode import decode
from rwkvx_kernels.chunk_attention.triton_descent import descend
from rwkvx_kernels.chunk_attention.triton_forward import forward, shape_of
from rwkvx_kernels.chunk_attention.triton_pairs import blocks_of, lists_of
from rwkvx_kernels.chunk_attention.triton_select import select

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Chunk size, top k, head size, query heads, key/value heads.
SHAPES = [(16, 8, 64, 16, 16), (48, 3, 24, 16, 4), (128, 8, 64, 16, 16), (128, 8, 128, 16, 2)]
# Chunks of a forest whose descent has two levels.
MANY = 2 * DENSE_NODES * FANOUT
SHAPES += [(2048, 3, 64, 16, 16), (64, 33, 96, 8, 8), (32, 1, 16, 4, 4)]


def case(dtype: str, chunk: int, topk: int, dim: int, heads: int, groups: int) -> Case:
    def empty(*shape: int, dtype: torch.dtype = DTYPES[dtype]) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def call() -> None:
        q, do = empty(1, 8192, heads, dim), empty(1, 8192, heads, dim)
        k, v = empty(1, 8192, groups, dim), empty(1, 8192, groups, dim)
        means = empty(1, groups, 8192 // chunk, dim, dtype=torch.float32)
        chosen = select(q, means, 0, chunk, topk)
        shape = shape_of(q, k, "bsgd", chunk, topk, 0)
        lists = lists_of(chosen, groups, shape.chunks)
        blocks = blocks_of(lists, shape.tile)
        _, lse = forward(q, k, v, chosen, lists, blocks, shape)
        backward(q, k, v, do, lse, lse, chosen, lists, blocks, shape)
        cached = (k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous())
        lengths = empty(1, dtype=torch.int64)
        append(*cached, means, k[:, :1], v[:, :1], lengths, chunk)
        decode(q[:, :1].contiguous(), *cached, means, [], lengths, chunk, topk)
        means = empty(1, groups, MANY, dim, dtype=torch.float32)
        forest = room_for(means[0]).tensors()
        descend(q[:, :64].contiguous(), means, forest, MANY * chunk - 64, chunk, topk)
        decode(q[:, :1].contiguous(), *cached, means, forest, lengths, chunk, topk)

    name = f"{dtype} chunk {chunk} top {topk} D {dim} H {heads}/{groups}"
    return Case(name, call, quick=dtype == "bfloat16" and (chunk, topk) == (128, 8))


CASES = [case(dtype, *shape) for dtype in DTYPES for shape in SHAPES]
