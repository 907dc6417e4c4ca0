"""Coarse-to-fine selection of past chunks: which tree each query descends.

Axes as in cpu_select.py; Q query rows of a group, E table columns.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rwkvx_kernels.chunk_attention.cpu_select import select_chunks
from rwkvx_kernels.chunk_attention.tree import RUN, ChunkTree, beam_widths, scored_whole

TreeOf = Callable[[int], ChunkTree]


def select(
    q_NTRD: Tensor,
    means_NCD: Tensor,
    trees: TreeOf | None,
    offset: int,
    chunk_size: int,
    topk: int,
) -> Tensor:
    """The `topk - 1` past chunks of each query: [N, T, R, topk - 1], as `select_chunks`.

    Every query's choice is its own: it depends on that query, the tree over the chunks of whole
    runs before it and the chunks after them, never on the queries that it is computed with.

    Args:
        trees: the tree over so many chunks of `means_NCD`, asked for in rising order; None scores
            every past chunk.
    """
    tokens = q_NTRD.shape[1]
    if trees is None or topk == 1:
        return select_chunks(q_NTRD, means_NCD, offset, chunk_size, topk)
    chosen, start = [], 0
    while start < tokens:
        chunks = (offset + start) // chunk_size // RUN * RUN
        stop = min(tokens, (chunks + RUN) * chunk_size - offset)
        part = q_NTRD[:, start:stop]
        if chunks <= scored_whole(topk):
            chosen.append(select_chunks(part, means_NCD, offset + start, chunk_size, topk))
        else:
            arguments = (offset + start, chunk_size, topk)
            chosen.append(_select(part, means_NCD, trees(chunks), *arguments))
        start = stop
    return torch.cat(chosen, dim=1)


def _select(
    q_NTRD: Tensor, means_NCD: Tensor, tree: ChunkTree, offset: int, chunk_size: int, topk: int
) -> Tensor:
    """Of queries whose chunks before the last whole run are those of `tree`: [N, T, R, slots]."""
    from rwkvx_kernels.chunk_attention.cpu_descent import descend

    widths = [beam_widths(topk)[level > 1] for level in range(1, len(tree.nodes) + 1)]
    heads, q_NQD = q_NTRD.shape[2], q_NTRD.flatten(1, 2)
    if q_NTRD.device.type != "cpu":
        tree = tree.to("cpu")
    arguments = (tree, offset, heads, chunk_size, widths, topk - 1)
    chosen_NQS = descend(q_NQD.cpu(), means_NCD.cpu(), *arguments)
    return chosen_NQS.to(q_NTRD.device).unflatten(1, (-1, heads))
