"""What coarse-to-fine selection descends, grown as chunks come and kept for the next call.

Axes as in common.py.
"""

from itertools import groupby

from torch import Tensor

from rwkvx_kernels.chunk_select.forest import Forest, grow, room_for
from rwkvx_kernels.chunk_select.tree import ChunkTree, empty_tree, grow_tree


class Trees:
    """The trees over the first chunks of some means, which may be written as they come."""

    def __init__(self, means_NCD: Tensor) -> None:
        self._means = means_NCD
        self._tree = empty_tree(means_NCD)
        self._forest: Forest | None = None
        self._grown: list[int] = []  # chunks that the forest was grown to, of each group

    def tree(self, chunks: int) -> ChunkTree:
        """The tree over the first `chunks` chunks; cheap when asked for in rising order."""
        self._tree = grow_tree(self._tree, self._means, chunks)
        return self._tree

    def forest(self, *chunks: int) -> list[Tensor]:
        """The tensors of a forest, which stay where they are.

        It is grown over at least the first `chunks` chunks: one number for all groups, or one for
        each row of a batch; none leaves it as it is.
        """
        forest = self._room()
        wanted = [n for n in chunks for _ in range(len(self._grown) // len(chunks))]
        if chunks and self._grown != wanted:
            start = 0
            for (old, new), run in groupby(zip(self._grown, wanted, strict=True)):
                stop = start + len(list(run))
                if old < new:
                    part = slice(start, stop)
                    grow(forest.rows(part), self._means[part], old, new)
                    self._grown[part] = [new] * (stop - start)
                start = stop
        return forest.tensors()

    def fill(self, groups: slice, other: "Trees", chunks: int, index: Tensor | None = None) -> None:
        """The first chunks of these groups are those of another, or of its groups `index`."""
        if groups.start is None and other._tree.chunks <= chunks:
            self._tree = other._tree if index is None else other._tree.rows(index)
        if other._forest is None:
            return
        grown = other._grown
        if index is not None:
            same = len(set(grown)) == 1  # then nobody looks at a device
            grown = grown[:1] * len(index) if same else [grown[i] for i in index.tolist()]
        self._room().rows(groups).fill(other._forest, min(chunks, max(grown)), index)
        self._grown[groups] = [min(chunks, n) for n in grown]

    def _room(self) -> Forest:
        if self._forest is None:
            self._forest = room_for(self._means)
            self._grown = [0] * len(self._means)
        return self._forest
