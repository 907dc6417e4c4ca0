"""What coarse-to-fine selection descends, grown as chunks come and kept for the next call.

Axes as in common.py.
"""

from torch import Tensor

from rwkvx_kernels.chunk_select.forest import Forest, grow, room_for
from rwkvx_kernels.chunk_select.tree import ChunkTree, empty_tree, grow_tree


class Trees:
    """The trees over the first chunks of some means, which may be written as they come."""

    def __init__(self, means_NCD: Tensor) -> None:
        self._means = means_NCD
        self._tree = empty_tree(means_NCD)
        self._forest: Forest | None = None
        self._grown = 0  # chunks that the forest was grown to

    def tree(self, chunks: int) -> ChunkTree:
        """The tree over the first `chunks` chunks; cheap when asked for in rising order."""
        self._tree = grow_tree(self._tree, self._means, chunks)
        return self._tree

    def forest(self, chunks: int) -> list[Tensor]:
        """The tensors of a forest grown over at least the first `chunks` chunks."""
        if self._forest is None:
            self._forest = room_for(self._means)
        if self._grown < chunks:
            grow(self._forest, self._means, self._grown, chunks)
            self._grown = chunks
        return self._forest.tensors()

    def copy(self, means_NCD: Tensor, chunks: int, index: Tensor | None = None) -> "Trees":
        """For a copy of the means whose first `chunks` are the same, those of groups `index`."""
        new = Trees(means_NCD)
        if self._tree.chunks <= chunks:
            new._tree = self._tree if index is None else self._tree.rows(index)
        if self._forest is not None:
            new._grown = min(self._grown, chunks)
            new._forest = self._forest.copy(new._grown, means_NCD, index)
        return new
