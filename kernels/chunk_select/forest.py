"""The chunk trees of all lengths at once, for queries that stand behind unequal numbers of chunks.

The tree over the first P chunks (common.py) is made of runs of RUN · GROWTH^i chunks, and what a
run is does not depend on P. So every whole run of every length is kept, and a query's tree is a
rule which of them to look at: member m of a level is that of the longest runs that fit into P
there. Each length of run has a copy of the table, in memory of fixed size, filled as chunks come.

Axes: S lengths of runs, N groups (batch x key/value heads), C chunks, M nodes of a level, D head
size.
"""

from itertools import count, takewhile
from typing import NamedTuple

import torch
from torch import Tensor

from rwkvx_kernels.chunk_select import common

# What a node's row has after its mean: the part of the radius, and room that nobody reads, so that
# rows are whole multiples of 16 bytes.
EXTRA = 4


class Forest(NamedTuple):
    """Runs of every length.

    Attributes:
        order_SNC: [S, N, C] int32, chunk numbers in the order of the leaves.
        nodes: for levels 1, 2, ...: [S, N, M, D + EXTRA], as those of `common.nodes_of`.
    """

    order_SNC: Tensor
    nodes: tuple[Tensor, ...]

    def tensors(self) -> list[Tensor]:
        """What kernels take."""
        return [self.order_SNC, *self.nodes]

    def rows(self, groups: slice) -> "Forest":
        """A view of some groups."""
        return Forest(self.order_SNC[:, groups], tuple(x[:, groups] for x in self.nodes))

    def fill(self, other: "Forest", chunks: int, index: Tensor | None = None) -> None:
        """The first chunks from another forest, or from its groups `index`."""
        size = 1
        for old, fresh in zip(other.tensors(), self.tensors(), strict=False):
            members = chunks // size
            part = old[:, :, :members]
            # A shorter capacity has fewer lengths of runs, and a longer one more.
            lengths = min(len(old), len(fresh))
            fresh[:lengths, :, :members] = (part if index is None else part[:, index])[:lengths]
            size *= common.FANOUT


def run_lengths(chunks: int) -> list[int]:
    """Lengths of the runs that fit into so many chunks."""
    return list(takewhile(lambda x: x <= chunks, (common.RUN * common.GROWTH**i for i in count())))


def room_for(means_NCD: Tensor) -> Forest:
    """A forest that nothing has grown in, for as many chunks as there are."""
    groups, chunks, dim = means_NCD.shape
    lengths, levels, nodes = len(run_lengths(chunks)), [], chunks // common.FANOUT
    while lengths and nodes:
        levels.append(means_NCD.new_empty((lengths, groups, nodes, dim + EXTRA)))
        nodes //= common.FANOUT
    # Whoever descends where nothing has grown yet finds a chunk, if not the right one.
    order = means_NCD.new_zeros((lengths, groups, chunks), dtype=torch.int32)
    return Forest(order, tuple(levels))


def grow(forest: Forest, means_NCD: Tensor, old: int, new: int) -> None:
    """Fill in the runs that the chunks `old` ... `new` - 1 complete."""
    for i, run in enumerate(run_lengths(new)):
        first, stop = old // run * run, new // run * run
        if first == stop:
            continue
        part = means_NCD[:, first:stop]
        order_NP = common.order_by_likeness(part, run) + first
        forest.order_SNC[i, :, first:stop] = order_NP
        for level, nodes_SNME in enumerate(forest.nodes, 1):
            size = common.FANOUT**level
            if size >= run * common.GROWTH:  # such a node is always made of longer runs
                break
            begin, end = first // size, stop // size
            if begin < end:
                ordered = forest.order_SNC[i, :, begin * size : end * size].long()
                nodes_NME = common.nodes_of(means_NCD, ordered, size)
                nodes_SNME[i, :, begin:end, : nodes_NME.shape[2]] = nodes_NME
