"""The tree over chunk means that coarse-to-fine selection descends: chunks grouped by likeness.

A node of level j stands for `FANOUT`^j chunks and has `FANOUT` children of level j - 1 (level 0: a
chunk). The first P chunks are cut into aligned runs, each as long as can be: RUN · GROWTH^i
chunks. The chunks of a run are ordered by halving it again and again along the direction of
largest variance; nodes are what then stands together. The tree is a function of the P means
alone; as P grows, GROWTH runs of one length become a longer one, so that a chunk is sorted a
logarithmic number of times.

Axes: N groups (batch x key/value heads), P chunks in the tree, M nodes of a level, D head size.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

FANOUT = 32
# Chunks of the shortest run: what comes after the last run is scored chunk by chunk.
RUN = 256
# So many runs of equal length are sorted anew as one.
GROWTH = 4
# A level of at most so many nodes is scored whole, without descending to it.
DENSE_NODES = 1024
POWER_ITERATIONS = 5
# How much of the radius around a node's mean counts for its score.
PART_OF_RADIUS = 0.3


def beam_widths(topk: int) -> tuple[int, int]:
    """How many nodes of level 1, and of each level above, a query keeps for the next one."""
    return max(48, 4 * (topk - 1)), max(24, 4 * (topk - 1))


def scored_whole(topk: int) -> int:
    """Up to so many chunks in whole runs are scored one by one: those of a query's nodes are as
    many."""
    return FANOUT * beam_widths(topk)[0]


def first_level(chunks: int) -> int:
    """Where the descent of a tree over so many chunks starts; 0 if it has no level of nodes."""
    level = 0
    while chunks >= FANOUT and (level == 0 or chunks > DENSE_NODES):
        chunks, level = chunks // FANOUT, level + 1
    return level


class ChunkTree(NamedTuple):
    """The tree over the first P chunks, P a multiple of `RUN`.

    Attributes:
        order_NP: [N, P] int64, chunk numbers in the order of the leaves: node i of level j holds
            order_NP[:, i · FANOUT^j : (i + 1) · FANOUT^j].
        nodes: for levels 1, 2, ...: M of them, in blocks (`blocks_of`) of D + 1 columns, to be
            multiplied with `node_queries`.
        leaves: for each run: its means in the order of the leaves, in blocks of D columns, so that
            what a query reads of a node lies together, one chunk to a lane.
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
        return rows_of(self.nodes[level - 1], self.chunks // FANOUT**level)

    @property
    def first_level(self) -> int:
        """Where the descent starts: the lowest level of few nodes, or else the highest."""
        return first_level(self.chunks)

    def rows(self, index: Tensor) -> "ChunkTree":
        """The groups `index` alone."""
        return self._map(lambda x: x[index])

    def to(self, device: str) -> "ChunkTree":
        """The same elsewhere."""
        return self._map(lambda x: x.to(device))

    def _map(self, f: Callable[[Tensor], Tensor]) -> "ChunkTree":
        nodes, leaves = (tuple(map(f, part)) for part in (self.nodes, self.leaves))
        return ChunkTree(f(self.order_NP), nodes, leaves)


def empty_tree(means_NCD: Tensor) -> ChunkTree:
    """The tree over no chunk."""
    return ChunkTree(means_NCD.new_empty((len(means_NCD), 0), dtype=torch.int64), (), ())


def trees_of(means_NCD: Tensor) -> Callable[[int], ChunkTree]:
    """The tree over so many of the chunks; cheap when asked for in rising order."""
    tree = empty_tree(means_NCD)

    def grow(chunks: int) -> ChunkTree:
        nonlocal tree
        if chunks < tree.chunks:
            tree = empty_tree(means_NCD)
        tree = grow_tree(tree, means_NCD, chunks)
        return tree

    return grow


def node_queries(q: Tensor) -> Tensor:
    """[..., D] -> [..., D + 1]: the product with a node, its centre c and r, is q · c + |q| r.

    That is the best score that a point at most r away from c can have.
    """
    return torch.cat([q, q.norm(dim=-1, keepdim=True)], dim=-1)


def grow_tree(tree: ChunkTree, means_NCD: Tensor, chunks: int) -> ChunkTree:
    """The tree over the first `chunks` (rounded down to whole runs); `tree` covers fewer of them.

    Args:
        tree: made from the same means; it stays valid.
        means_NCD: [N, C, D], C >= chunks.
    """
    chunks = chunks // RUN * RUN
    if chunks == tree.chunks:
        return tree
    regions, kept = list(_regions(chunks)), 0
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
            order = order_by_likeness(means_NCD[:, first : first + size], size) + first
            orders.append(order)
            leaves.append(blocks_of(_in_order(means_NCD, order)))
    order_NP = torch.cat(orders, dim=1)
    nodes = []
    size, level = FANOUT, 1
    while size <= chunks:
        first = kept // size
        new = nodes_of(means_NCD, order_NP[:, first * size : chunks // size * size], size)
        if first:
            new = torch.cat([tree.level(level)[:, :first], new], dim=1)
        nodes.append(blocks_of(new))
        size, level = size * FANOUT, level + 1
    return ChunkTree(order_NP, tuple(nodes), tuple(leaves))


def _regions(chunks: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, chunks of a run) of the runs of equal length, the longest first."""
    size = RUN
    while size * GROWTH <= chunks:
        size *= GROWTH
    start = 0
    while size >= RUN:
        stop = chunks // size * size
        if stop > start:
            yield start, stop, size
        start, size = stop, size // GROWTH


def order_by_likeness(means_NCD: Tensor, run: int) -> Tensor:
    """Order within each run of `run` chunks such that every node's chunks are alike: [N, C].

    A part is halved at the median along its direction of largest variance (power iteration),
    until parts have `FANOUT` chunks.
    """
    groups = len(means_NCD)
    x = means_NCD.unflatten(1, (-1, run)).flatten(0, 1)
    order = torch.arange(run, device=x.device).expand(len(x), -1)
    size = run
    while size > FANOUT:
        x, order = x.reshape(-1, size, x.shape[-1]), order.reshape(-1, size)
        x_centred = x - x.mean(dim=1, keepdim=True)
        far = x_centred.square().sum(-1).argmax(dim=1)
        axis = x_centred[torch.arange(len(x), device=x.device), far].unsqueeze(-1)
        for _ in range(POWER_ITERATIONS):
            axis = x_centred.transpose(1, 2) @ (x_centred @ axis)
            axis = axis / axis.norm(dim=1, keepdim=True).clamp_min(1e-30)
        halves = (x_centred @ axis).squeeze(-1).argsort(dim=1, stable=True)
        order = order.gather(1, halves)
        x = x.gather(1, halves.unsqueeze(-1).expand_as(x))
        size //= 2
    start = torch.arange(means_NCD.shape[1] // run, device=x.device).repeat_interleave(run) * run
    return order.reshape(groups, -1) + start


def _in_order(means_NCD: Tensor, order_NP: Tensor) -> Tensor:
    return means_NCD.gather(1, order_NP.unsqueeze(-1).expand(-1, -1, means_NCD.shape[-1]))


def blocks_of(x_NMD: Tensor) -> Tensor:
    """Members by `FANOUT`, one to a lane: [N, M / FANOUT, D, FANOUT], the last block with zeros."""
    x_NMD = torch.nn.functional.pad(x_NMD, (0, 0, 0, -x_NMD.shape[1] % FANOUT))
    return x_NMD.unflatten(1, (-1, FANOUT)).transpose(2, 3).contiguous()


def rows_of(blocks: Tensor, members: int) -> Tensor:
    """The first `members` of `blocks_of`: [N, M, D]."""
    return blocks.transpose(2, 3).flatten(1, 2)[:, :members]


def nodes_of(means_NCD: Tensor, order_NP: Tensor, size: int) -> Tensor:
    """Of nodes of `size` consecutive chunks of `order_NP`: [N, P / size, D + 1].

    With the distance of the farthest of its chunk means, a node's score would bound the score of
    each of them. But in many dimensions a query rarely points to the farthest one: a part of that
    distance is what a good chunk of a node really scores, and finds far more of the best chunks.
    """
    members = _in_order(means_NCD, order_NP).unflatten(1, (-1, size))
    mean = members.mean(dim=2)
    radius = (members - mean.unsqueeze(2)).norm(dim=-1).amax(dim=2)
    return torch.cat([mean, PART_OF_RADIUS * radius.unsqueeze(-1)], dim=-1)
