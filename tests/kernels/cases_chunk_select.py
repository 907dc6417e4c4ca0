"""What `ahead_of_time.py` compiles of chunk selection."""

import torch
from ahead_of_time import Case
from cases_chunk_attention import DTYPES, SHAPES

from rwkvx_kernels.chunk_select.common import DENSE_NODES, FANOUT
from rwkvx_kernels.chunk_select.forest import room_for
from rwkvx_kernels.chunk_select.triton_decode import select_rows
from rwkvx_kernels.chunk_select.triton_descent import descend
from rwkvx_kernels.chunk_select.triton_ops import select_sequences

# Chunks of a forest whose descent has two levels.
MANY = 2 * DENSE_NODES * FANOUT


def case(dtype: str, chunk: int, topk: int, dim: int, heads: int, groups: int) -> Case:
    def call() -> None:
        q = torch.empty(1, 8192, heads, dim, dtype=DTYPES[dtype], device="meta")
        lengths = torch.empty(1, dtype=torch.int64, device="meta")
        select_sequences(q, q[:, :, :groups], False, chunk, topk)
        for chunks in (8192 // chunk, MANY):
            means = torch.empty(1, groups, chunks, dim, device="meta")
            forest = room_for(means[0]).tensors() if chunks == MANY else []
            part = q[:, :64].contiguous() if forest else q
            first = MANY * chunk - 64 if forest else 0
            descend(part, means, forest, first, chunk, topk)
            if topk > 1:
                select_rows(q[:, :1].contiguous(), means, forest, lengths, chunk, topk)

    name = f"{dtype} chunk {chunk} top {topk} D {dim} H {heads}/{groups}"
    return Case(name, call, quick=dtype == "bfloat16" and (chunk, topk) == (128, 8))


CASES = [case(dtype, *shape) for dtype in DTYPES for shape in SHAPES]
