"""Append-only keys and values, with the chunk means that selection reads.

Axes: B batch, T new tokens, G key/value heads, S capacity in tokens, C capacity in chunks,
D head size.
"""

import torch
from torch import Tensor

from rwkvx_kernels.chunk_attention.forest import Forest, grow, room_for
from rwkvx_kernels.chunk_attention.tree import ChunkTree, empty_tree, grow_tree

FIRST_CAPACITY = 512
GROWTH = 1.5


class KeyValueCache:
    """Keys, values and chunk means of the tokens read so far; the length lives in the state.

    Several states may share one cache: each sees the tokens below its own length. `append` writes
    in place where nothing was written before, and into a copy otherwise, so that a state can be
    continued any number of times and forking costs nothing until then.
    """

    def __init__(
        self, batch: int, heads: int, dim: int, chunk_size: int, like: Tensor, capacity: int = 0
    ) -> None:
        self.chunk_size = chunk_size
        chunks = max(-(-capacity // chunk_size), 1)
        shape = (batch, heads, chunks * chunk_size, dim)
        self.k_BGSD = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.v_BGSD = torch.empty_like(self.k_BGSD)
        self.means_BGCD = torch.empty(
            (batch, heads, chunks, dim),
            dtype=torch.promote_types(like.dtype, torch.float32),
            device=like.device,
        )
        self.written = 0
        self._tree = empty_tree(self.means_BGCD.flatten(0, 1))
        self._forest: Forest | None = None
        self._grown = 0  # chunks that the forest was grown to

    @property
    def batch(self) -> int:
        """Batch rows."""
        return self.k_BGSD.shape[0]

    @property
    def capacity(self) -> int:
        """Tokens that fit without growing."""
        return self.k_BGSD.shape[2]

    def append(self, length: int, k_BTGD: Tensor, v_BTGD: Tensor) -> "KeyValueCache":
        """Write T tokens after the first `length`; returns the cache that holds them all."""
        end = length + k_BTGD.shape[1]
        cache = self
        if length < self.written:
            cache = self._copy(length, max(end, self.capacity))
        elif end > self.capacity:
            cache = self._copy(length, max(end, FIRST_CAPACITY, int(GROWTH * self.capacity)))
        cache.k_BGSD[:, :, length:end] = k_BTGD.transpose(1, 2)
        cache.v_BGSD[:, :, length:end] = v_BTGD.transpose(1, 2)
        first, last = length // self.chunk_size, end // self.chunk_size
        if last > first:
            done = cache.k_BGSD[:, :, first * self.chunk_size : last * self.chunk_size]
            done = done.unflatten(2, (last - first, self.chunk_size))
            cache.means_BGCD[:, :, first:last] = done.to(cache.means_BGCD.dtype).mean(dim=3)
        cache.written = end
        return cache

    def tree(self, chunks: int) -> ChunkTree:
        """The tree over the first `chunks` chunks; kept, so that the next one only adds to it."""
        means_NCD = self.means_BGCD.flatten(0, 1)
        if chunks < self._tree.chunks:
            self._tree = empty_tree(means_NCD)
        self._tree = grow_tree(self._tree, means_NCD, chunks)
        return self._tree

    def forest(self, chunks: int) -> Forest:
        """The forest, grown over at least the first `chunks` chunks."""
        means_NCD = self.means_BGCD.flatten(0, 1)
        if self._forest is None:
            self._forest = room_for(means_NCD)
        if self._grown < chunks:
            grow(self._forest, means_NCD, self._grown, chunks)
            self._grown = chunks
        return self._forest

    def rows(self, length: int, index: Tensor) -> "KeyValueCache":
        """A new cache of the batch rows `index`, of the same capacity, with the first tokens."""
        return self._copy(length, self.capacity, index)

    def bytes_per_token(self) -> float:
        """Memory that one more token of one sequence takes, in bytes."""
        heads, dim = self.k_BGSD.shape[1], self.k_BGSD.shape[3]
        mean = self.means_BGCD.element_size() / self.chunk_size
        return heads * dim * (2 * self.k_BGSD.element_size() + mean)

    def _copy(self, length: int, capacity: int, index: Tensor | None = None) -> "KeyValueCache":
        batch, heads, _, dim = self.k_BGSD.shape
        rows = batch if index is None else len(index)
        new = KeyValueCache(rows, heads, dim, self.chunk_size, self.k_BGSD, capacity)
        chunks = length // self.chunk_size
        for old, fresh, size in (
            (self.k_BGSD, new.k_BGSD, length),
            (self.v_BGSD, new.v_BGSD, length),
            (self.means_BGCD, new.means_BGCD, chunks),
        ):
            part = old[:, :, :size]
            fresh[:, :, :size] = part if index is None else part[index]
        new.written = length
        groups = None
        if index is not None:
            head = torch.arange(heads, device=index.device)
            groups = (index[:, None] * heads + head).flatten()
        if self._tree.chunks <= chunks:
            new._tree = self._tree if groups is None else self._tree.rows(groups)
        if self._forest is not None:
            new._grown = min(self._grown, chunks)
            new._forest = self._forest.copy(new._grown, new.means_BGCD.flatten(0, 1), groups)
        return new
