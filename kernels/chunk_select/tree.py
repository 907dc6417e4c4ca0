"""The tree over chunk means (common.py) as the fast forms keep it: grown, laid out by node.

Axes as in common.py; E columns (D of chunks, D + 1 of nodes).
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rwkvx_kernels.chunk_select import common
from rwkvx_kernels.chunk_select.common import FANOUT


class ChunkTree(NamedTuple):
    """The tree over the first P chunks, P a multiple of `RUN`.

    What a query reads of a node lies together: a table of its children, one to a lane.

    Attributes:
        order_NP: [N, P] int64, chunk numbers in the order of the leaves: node i of level j holds
            order_NP[:, i · FANOUT^j : (i + 1) · FANOUT^j].
        nodes: for levels 1, 2, ...: tables (`tables_of`) of M nodes of D + 1 columns, to be
            multiplied with `node_queries`.
        leaves: for each run: tables of its means, in the order of the leaves.
    """

    order_NP: Tensor
    nodes: tuple[Tensor, ...]
    leaves: tuple[Tensor, ...]

    @property
    def chunks(self) -> int:
        """P."""
        return self.order_NP.shape[1]

    def level(self, level: int) -> Tensor:
        """The nodes of a level as rows: [N, M, D + 1]."""
        rows = self.nodes[level - 1].transpose(2, 3).flatten(1, 2)
        return rows[:, : self.chunks // FANOUT**level]

    def rows(self, index: Tensor) -> "ChunkTree":
        """The groups `index` alone."""
        nodes, leaves = (tuple(x[index] for x in part) for part in (self.nodes, self.leaves))
        return ChunkTree(self.order_NP[index], nodes, leaves)


TreeOf = Callable[[int], ChunkTree]


def tables_of(x_NME: Tensor) -> Tensor:
    """Members by `FANOUT`, one to a lane: [N, M / FANOUT, E, FANOUT], the last table with zeros."""
    x_NME = torch.nn.functional.pad(x_NME, (0, 0, 0, -x_NME.shape[1] % FANOUT))
    return x_NME.unflatten(1, (-1, FANOUT)).transpose(2, 3).contiguous()


def empty_tree(means_NCD: Tensor) -> ChunkTree:
    """The tree over no chunk."""
    return ChunkTree(means_NCD.new_empty((len(means_NCD), 0), dtype=torch.int64), (), ())


def grow_tree(tree: ChunkTree, means_NCD: Tensor, chunks: int) -> ChunkTree:
    """The tree over the first `chunks` (rounded down to whole runs).

    Args:
        tree: over any number of chunks of the same means; it stays valid.
        means_NCD: [N, C, D], C >= chunks.
    """
    chunks = chunks // common.RUN * common.RUN
    if chunks == tree.chunks:
        return tree
    if chunks < tree.chunks:
        tree = empty_tree(means_NCD)
    regions, kept = list(common.regions_of(chunks)), 0
    for start, stop, size in regions:
        kept = start + (min(stop, tree.chunks) - start) // size * size
        if kept < stop:
            break
    orders, leaves, reached = [tree.order_NP[:, :kept]], [], 0
    for run in tree.leaves:
        reached += run.shape[1] * FANOUT
        if reached <= kept:
            leaves.append(run)
    for start, stop, size in regions:
        for first in range(max(start, kept), stop, size):
            order = common.order_by_likeness(means_NCD[:, first : first + size], size) + first
            orders.append(order)
            leaves.append(tables_of(common.in_order(means_NCD, order)))
    order_NP = torch.cat(orders, dim=1)
    nodes = []
    size, level = FANOUT, 1
    while size <= chunks:
        first = kept // size
        new = common.nodes_of(means_NCD, order_NP[:, first * size : chunks // size * size], size)
        if first:
            new = torch.cat([tree.level(level)[:, :first], new], dim=1)
        nodes.append(tables_of(new))
        size, level = size * FANOUT, level + 1
    return ChunkTree(order_NP, tuple(nodes), tuple(leaves))


def by_tree(
    tokens: int, offset: int, chunk_size: int, topk: int, trees: TreeOf | None
) -> Iterator[tuple[slice, ChunkTree | None]]:
    """Cut queries at positions `offset` ... where the tree before them changes.

    Args:
        trees: asked for in rising order; None: every past chunk is scored.

    Yields:
        some queries and the tree that they descend; None where every past chunk is scored.
    """
    start = tokens
    if trees is not None:
        flat = (common.scored_whole(topk) // common.RUN + 1) * common.RUN
        start = min(tokens, max(0, flat * chunk_size - offset))
    if start:
        yield slice(0, start), None
    while trees is not None and start < tokens:
        chunks = (offset + start) // chunk_size // common.RUN * common.RUN
        stop = min(tokens, (chunks + common.RUN) * chunk_size - offset)
        yield slice(start, stop), trees(chunks)
        start = stop
