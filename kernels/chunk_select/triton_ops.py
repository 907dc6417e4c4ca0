"""The Triton kernels of chunk selection as operators of torch; a choice has no gradient.

Importing this module registers `torch.ops.rwkvx.select_chunks*`.
"""

from typing import Any

import torch
from torch import Tensor

from rwkvx_kernels.chunk_select import common
from rwkvx_kernels.chunk_select.trees import Trees
from rwkvx_kernels.chunk_select.triton_descent import descend
from rwkvx_kernels.chunk_select.triton_means import means_of
from rwkvx_kernels.dispatch import runs_of
from rwkvx_kernels.tools.operators import adjacent, operator


def _fake(q: Tensor, *args: Any) -> Tensor:
    return q.new_empty((*q.shape[:3], args[-1] - 1), dtype=torch.int32)


@operator("select_chunks", _fake)
def select_triton(
    q: Tensor, means: Tensor, forest: list[Tensor], first: int, chunk_size: int, topk: int
) -> Tensor:
    """As `triton_descent.descend`; tensors of any strides."""
    return descend(q.contiguous(), means.contiguous(), forest, first, chunk_size, topk)


def select_sequences(q: Tensor, k: Tensor, coarse: bool, chunk_size: int, topk: int) -> Tensor:
    """The choice of whole sequences q [B, T, H, D], k [B, T, G, D]: [B, T, H, topk - 1] int32."""
    means = means_of(adjacent(k), chunk_size)
    forest: list[Tensor] = []
    if coarse and means.shape[2] > common.scored_whole(topk):
        forest = Trees(means.flatten(0, 1)).forest(means.shape[2])
    return descend(q.contiguous(), means, forest, 0, chunk_size, topk)


@operator("select_chunks_whole", _fake)
def select_whole(
    q: Tensor, k: Tensor, cu_seqlens: Tensor | None, coarse: bool, chunk_size: int, topk: int
) -> Tensor:
    """`select_sequences`, of packed sequences if there are offsets; counted from the start of
    each."""
    if cu_seqlens is None:
        return select_sequences(q, k, coarse, chunk_size, topk)
    chosen = q.new_empty((*q.shape[:3], topk - 1), dtype=torch.int32)
    for run in runs_of(cu_seqlens, *q.shape[:2]):
        own = run.rows(q), run.rows(k)
        run.rows(chosen).copy_(select_sequences(*own, coarse, chunk_size, topk))
    return chosen
