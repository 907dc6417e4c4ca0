"""Append-only keys and values, with the chunk means that selection reads.

Axes: B batch, T new tokens, G key/value heads, S capacity in tokens, C capacity in chunks,
D head size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rwkvx_kernels.chunk_select.common import chunk_means, scored_whole
from rwkvx_kernels.chunk_select.trees import Trees
from rwkvx_kernels.tools.operators import operator

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
        self.trees = Trees(self.means_BGCD.flatten(0, 1))

    @classmethod
    def of(
        cls, k_BGSD: Tensor, v_BGSD: Tensor, means_BGCD: Tensor, chunk_size: int, written: int
    ) -> "KeyValueCache":
        """Around tensors that hold the first `written` tokens."""
        batch, heads, _, dim = k_BGSD.shape
        cache = cls(batch, heads, dim, chunk_size, k_BGSD)
        cache.k_BGSD, cache.v_BGSD, cache.means_BGCD = k_BGSD, v_BGSD, means_BGCD
        cache.trees, cache.written = Trees(means_BGCD.flatten(0, 1)), written
        return cache

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
        cache = self.reserve(length, end)
        write = _traced_write if torch.compiler.is_compiling() else _write
        tensors = (cache.k_BGSD, cache.v_BGSD, cache.means_BGCD, k_BTGD, v_BTGD)
        write(*tensors, length, self.chunk_size)
        return cache

    def append_each(self, lengths_B: Tensor, k_BTGD: Tensor, v_BTGD: Tensor) -> None:
        """Write one token after `lengths` tokens of each row, in place, without a look at them.

        By a Triton kernel, into places that were reserved.
        """
        from rwkvx_kernels.chunk_attention.triton_append import append_each

        tensors = (self.k_BGSD, self.v_BGSD, self.means_BGCD, k_BTGD, v_BTGD)
        append_each(*tensors, lengths_B, self.chunk_size)

    def forest(self, topk: int, *lengths: int) -> list[Tensor]:
        """What coarse-to-fine selection descends behind lengths on the device; it stays in place.

        Whoever knows the lengths of all rows on the host gives them as chunks complete: it grows to
        them, by launches that wait for nothing. [] where the capacity is too small to leave out any
        chunk.
        """
        if self.means_BGCD.shape[2] <= scored_whole(topk):
            return []
        return self.trees.forest(*(length // self.chunk_size for length in lengths))

    def appended_elsewhere(self, length: int, end: int) -> None:
        """Tokens length ... end - 1 were written to reserved places: completes their chunks."""
        _write_means(self.k_BGSD, self.means_BGCD, length, end, self.chunk_size)

    def reserve(self, length: int, end: int) -> "KeyValueCache":
        """This cache or a copy of its first tokens: places length ... end - 1 may be written to.

        Whoever else continues one of its states writes to a copy from now on.
        """
        cache = self
        if length < self.written:
            cache = self._copy(length, max(end, self.capacity))
        elif end > self.capacity:
            cache = self._copy(length, max(end, FIRST_CAPACITY, int(GROWTH * self.capacity)))
        cache.written = end
        return cache

    def rows(self, length: int, index: Tensor) -> "KeyValueCache":
        """A new cache of the batch rows `index`, of the same capacity, with the first tokens."""
        return self._copy(length, self.capacity, index)

    @classmethod
    def joined(cls, rows: Sequence[tuple["KeyValueCache", int]], capacity: int) -> "KeyValueCache":
        """The first tokens of caches of one row, as one; no place of it is left to others."""
        heads, _, dim = rows[0][0].k_BGSD.shape[1:]
        new = cls(len(rows), heads, dim, rows[0][0].chunk_size, rows[0][0].k_BGSD, capacity)
        for i, (cache, length) in enumerate(rows):
            new._fill(slice(i, i + 1), cache, length)
        new.written = new.capacity
        return new

    def bytes_per_token(self) -> float:
        """Memory that one more token of one sequence takes, in bytes."""
        heads, dim = self.k_BGSD.shape[1], self.k_BGSD.shape[3]
        mean = self.means_BGCD.element_size() / self.chunk_size
        return heads * dim * (2 * self.k_BGSD.element_size() + mean)

    def _copy(self, length: int, capacity: int, index: Tensor | None = None) -> "KeyValueCache":
        batch, heads, _, dim = self.k_BGSD.shape
        rows = batch if index is None else len(index)
        new = KeyValueCache(rows, heads, dim, self.chunk_size, self.k_BGSD, capacity)
        new._fill(slice(None), self, length, index)
        new.written = length
        return new

    def _fill(
        self, rows: slice, other: "KeyValueCache", length: int, index: Tensor | None = None
    ) -> None:
        """The first tokens of these rows from another cache, or from its rows `index`."""
        for old, fresh, size in (
            (other.k_BGSD, self.k_BGSD, length),
            (other.v_BGSD, self.v_BGSD, length),
            (other.means_BGCD, self.means_BGCD, length // self.chunk_size),
        ):
            kept = old[:, :, :size]
            fresh[rows, :, :size] = kept if index is None else kept[index]
        heads, groups = self.k_BGSD.shape[1], None
        if index is not None:
            head = torch.arange(heads, device=index.device)
            groups = (index[:, None] * heads + head).flatten()
        own = rows
        if rows.start is not None:
            own = slice(rows.start * heads, rows.stop * heads)
        self.trees.fill(own, other.trees, length // self.chunk_size, groups)


def _write(
    cached_k: Tensor,
    cached_v: Tensor,
    means: Tensor,
    k: Tensor,
    v: Tensor,
    length: int,
    chunk_size: int,
) -> None:
    """k, v [B, T, G, D] into [B, G, S, D] after `length` tokens; the means of completed chunks."""
    end = length + k.shape[1]
    cached_k[:, :, length:end] = k.transpose(1, 2)
    cached_v[:, :, length:end] = v.transpose(1, 2)
    _write_means(cached_k, means, length, end, chunk_size)


def _write_means(cached_k: Tensor, means: Tensor, length: int, end: int, chunk_size: int) -> None:
    first, last = length // chunk_size, end // chunk_size
    if last > first:
        done = cached_k[:, :, first * chunk_size : last * chunk_size]
        means[:, :, first:last] = chunk_means(done, chunk_size)


# For `torch.compile`, which would compile completing a chunk and not completing one each.
_traced_write = operator(
    "chunk_attention_append", lambda *_: None, mutates=("cached_k", "cached_v", "means")
)(_write)
