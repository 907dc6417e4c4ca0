"""Bookkeeping of the chunk attention in torch: which queries visit which keys, in which order.

Axes as in torch_form.py.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Largest score matrix worked on at once: 2 MB in float32, the second-level cache of a core.
TILE_SCORES = 1 << 19
# Keys of chosen chunks gathered at once, which are read from there before they leave the cache.
TILE_KEYS = 1 << 13
# Partial outputs of one tile of queries, in elements. Products of large chunks are the longer
# the more queries there are.
TILE_PARTIALS, LARGE_TILE_PARTIALS = 1 << 22, 1 << 24
# From this chunk size on, each chunk is worth a product of its own: no copies, no padding. For
# chosen chunks there must also be so many queries of each.
LARGE_CHUNK, MANY_QUERIES = 256, 64
# Most tokens and most pairs of such a product. Of the own chunk, half of the masked square is then
# never computed.
LARGE_TILE = 512


def query_tiles(shape: torch.Size, offset: int, size: int, topk: int) -> Iterator[tuple[int, int]]:
    """Split T queries [N, T, R, D] at `offset` into tiles (start, stop) of bounded work.

    Tiles end at chunk boundaries.
    """
    groups, tokens, heads, dim = shape
    partials = LARGE_TILE_PARTIALS if size >= LARGE_CHUNK else TILE_PARTIALS
    wanted = partials // (groups * heads * dim * topk)
    step = max(1, wanted // size) * size
    start = 0
    while start < tokens:
        stop = min(tokens, start + step - (offset + start) % step)
        yield start, stop
        start = stop


class OwnTile(NamedTuple):
    """Queries of one or several chunks of equal length against their own chunks.

    `tokens` queries from `first` (in the tile), `chunks` chunks from number `chunk`, of whose
    tokens the first `keys_read` exist; the last query stands at the last of these.
    """

    first: int
    tokens: int
    chunk: int
    chunks: int
    keys_read: int

    def queries(self, x_NTR: Tensor) -> Tensor:
        """[N, T, R, ...] -> [N·chunks, m·R, ...]."""
        x = x_NTR[:, self.first : self.first + self.tokens]
        return x.unflatten(1, (self.chunks, -1)).flatten(2, 3).flatten(0, 1)

    def put(self, target_NTR: Tensor, x: Tensor) -> None:
        """Write rows laid out as `queries` gives them."""
        into = target_NTR[:, self.first : self.first + self.tokens]
        into.copy_(x.reshape(into.shape))

    def keys(self, k_NCSD: Tensor) -> Tensor:
        """[N, C, S, D] -> [N·chunks, keys, D]."""
        return k_NCSD[:, self.chunk : self.chunk + self.chunks, : self.keys_read].flatten(0, 1)

    def add(self, target_NCSD: Tensor, x: Tensor) -> None:
        """Add to the keys that `keys` gives."""
        into = target_NCSD[:, self.chunk : self.chunk + self.chunks, : self.keys_read]
        into += x.view(into.shape)

    def seen(self, marks: Tensor, heads: int) -> Tensor:
        """Whether a query sees a mark: [n, keys, D] -> [n, m·R, D]."""
        seen = marks.cumsum(dim=1)[:, -self.tokens // self.chunks :] > 0
        return seen.repeat_interleave(heads, dim=1)

    def mask(self, heads: int, device: torch.device) -> Tensor:
        """[m·R, m], True where one of the last m keys comes after the query."""
        token = torch.arange(self.tokens // self.chunks, device=device)
        return token > token.repeat_interleave(heads)[:, None]


def own_tiles(start: int, stop: int, size: int) -> Iterator[OwnTile]:
    """Cut positions start ... stop - 1 into an unaligned head, whole chunks and a tail.

    Large chunks are cut at multiples of `LARGE_TILE` instead.
    """
    longest = LARGE_TILE if size >= LARGE_CHUNK and size % LARGE_TILE == 0 else size
    position = start
    while position < stop:
        chunk, within = divmod(position, size)
        if longest == size and within == 0 and stop - position >= size:
            chunks = (stop - position) // size
            tokens, keys_read = chunks * size, size
        else:
            chunks = 1
            tokens = min(longest - within % longest, stop - position)
            keys_read = within + tokens
        yield OwnTile(position - start, tokens, chunk, chunks, keys_read)
        position += tokens


class PairTile(NamedTuple):
    """Consecutive pairs: for each of `chunks`, `size` of them."""

    pairs: slice
    chunks: Tensor
    size: int
    single: int  # the chunk's number if there is one, else -1

    def gather(self, x_chunks: Tensor) -> Tensor:
        """[N·C, S, D] -> [chunks, S, D]; a view for a single chunk."""
        if self.single >= 0:
            return x_chunks[self.single : self.single + 1]
        return x_chunks.index_select(0, self.chunks)


class Pairs:
    """The (query row, chosen chunk) pairs of one tile, sorted by chunk.

    Small chunks, and few queries of each: padded to bundles of equal size, so that many chunks
    share one batched product. Otherwise one bundle for each chunk, of exactly its queries.

    Attributes:
        count, padded: pairs without and with padding.
        rows: [padded] query row of each pair.
        is_padding: [padded] True for the pairs that fill up a bundle.
        place: [Q, slots] where the pair of each query and slot stands; `padded` for none.
        missing: [Q, slots] True where a query has no such chunk.
    """

    def __init__(self, chosen: Tensor, chunks: int, size: int) -> None:
        groups, slots = chosen.shape[0], chosen.shape[-1]
        first = torch.arange(groups, device=chosen.device)[:, None] * chunks
        number = (chosen.flatten(1) + first).masked_fill_(chosen.flatten(1) < 0, -1).flatten()
        self.size = size
        self.count = int((number >= 0).sum())
        if not self.count:
            return
        self.missing = (number < 0).view(-1, slots)
        order = number.argsort()[number.numel() - self.count :]  # the missing ones sort first
        number = number[order]
        self.chunk, per_chunk = torch.unique_consecutive(number, return_counts=True)
        mean = self.count // len(self.chunk)
        alone = size >= LARGE_CHUNK and mean >= MANY_QUERIES
        self.bundle = 0 if alone else _bundle_size(mean)
        bundles = -(-per_chunk // self.bundle) if self.bundle else torch.ones_like(per_chunk)
        room = bundles * self.bundle if self.bundle else per_chunk
        self.bundles, self.per_chunk = bundles, per_chunk
        shift = (room.cumsum(0) - room) - (per_chunk.cumsum(0) - per_chunk)
        target = torch.arange(self.count, device=number.device) + shift.repeat_interleave(per_chunk)
        self.padded = int(room.sum())
        self.rows = number.new_zeros(self.padded)
        self.rows[target] = order // slots
        self.is_padding = torch.ones_like(self.rows, dtype=torch.bool)
        self.is_padding[target] = False
        self.place = number.new_full(self.missing.shape, self.padded)
        self.place.view(-1)[order] = target

    def empty(self, rows: Tensor) -> Tensor:
        """Room for a row of each pair, and zeros for a pair that is missing: [padded + 1, D]."""
        made = rows.new_empty((self.padded + 1, rows.shape[-1]))
        made[-1] = 0
        return made

    def tiles(self) -> Iterator[PairTile]:
        """Consecutive bundles of at most `TILE_SCORES` scores and `TILE_KEYS` keys."""
        if not self.bundle:
            start = 0
            for chunk, n in zip(self.chunk.tolist(), self.per_chunk.tolist(), strict=True):
                one, end = self.chunk.new_tensor([chunk]), start + n
                while start < end:
                    size = min(end - start, LARGE_TILE)
                    yield PairTile(slice(start, start + size), one, size, chunk)
                    start += size
            return
        owner = self.chunk.repeat_interleave(self.bundles)
        step = max(1, min(TILE_SCORES // self.bundle, TILE_KEYS) // self.size)
        for a in range(0, len(owner), step):
            b = min(a + step, len(owner))
            pairs = slice(a * self.bundle, b * self.bundle)
            yield PairTile(pairs, owner[a:b], self.bundle, -1)


def _bundle_size(mean: int) -> int:
    """A power of two near half of the mean number of pairs of a chunk, 8 to 256."""
    return min(256, max(8, 1 << max(0, (mean // 2).bit_length())))
