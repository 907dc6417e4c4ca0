"""Bookkeeping of the CPU chunk attention: which queries meet which keys, in which order.

Axes as in cpu.py.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Largest score matrix worked on at once: 2 MB in float32, the second-level cache of a core.
TILE_SCORES = 1 << 19
# Partial outputs of one tile of queries, in elements. Products of large chunks are the longer
# the more queries there are.
TILE_PARTIALS, LARGE_TILE_PARTIALS = 1 << 22, 1 << 24
# From this chunk size on, each chunk is worth a product of its own: no copies, no padding.
LARGE_CHUNK = 256
# Most tokens and most pairs of such a product. Of the own chunk, half of the masked square is then
# never computed.
LARGE_PIECE = 512


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


class OwnPiece(NamedTuple):
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

    def mask(self, heads: int, device: torch.device) -> Tensor:
        """[m·R, m], True where one of the last m keys comes after the query."""
        token = torch.arange(self.tokens // self.chunks, device=device)
        return token > token.repeat_interleave(heads)[:, None]


def own_pieces(start: int, stop: int, size: int) -> Iterator[OwnPiece]:
    """Cut positions start ... stop - 1 into an unaligned head, whole chunks and a tail.

    Large chunks are cut at multiples of `LARGE_PIECE` instead.
    """
    longest = LARGE_PIECE if size >= LARGE_CHUNK and size % LARGE_PIECE == 0 else size
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
        yield OwnPiece(position - start, tokens, chunk, chunks, keys_read)
        position += tokens


class PairTile(NamedTuple):
    """Consecutive blocks of `block` pairs; every block has one chunk."""

    pairs: slice
    chunks: Tensor
    block: int
    single: int  # the chunk's number if there is one block, else -1

    def gather(self, x_chunks: Tensor) -> Tensor:
        """[N·C, S, D] -> [blocks, S, D]; a view for a single block."""
        if self.single >= 0:
            return x_chunks[self.single : self.single + 1]
        return x_chunks.index_select(0, self.chunks)


class Pairs:
    """The (query row, chosen chunk) pairs of one tile, sorted by chunk.

    Small chunks: padded to blocks of equal size, so that many chunks share one batched product.
    Large chunks: one block each, of exactly its queries.

    Attributes:
        count, padded: pairs without and with padding.
        rows: [padded] query row of each pair.
        is_padding: [padded] True for the pairs that fill up a block.
        place: [Q, slots] where the pair of each query and slot stands.
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
        self.block = 0 if size >= LARGE_CHUNK else self._block_size(len(self.chunk))
        blocks = -(-per_chunk // self.block) if self.block else torch.ones_like(per_chunk)
        room = blocks * self.block if self.block else per_chunk
        self.blocks, self.per_chunk = blocks, per_chunk
        shift = (room.cumsum(0) - room) - (per_chunk.cumsum(0) - per_chunk)
        target = torch.arange(self.count, device=number.device) + shift.repeat_interleave(per_chunk)
        self.padded = int(room.sum())
        self.rows = number.new_zeros(self.padded)
        self.rows[target] = order // slots
        self.is_padding = torch.ones_like(self.rows, dtype=torch.bool)
        self.is_padding[target] = False
        self.place = number.new_zeros(self.missing.shape)
        self.place.view(-1)[order] = target

    def _block_size(self, distinct: int) -> int:
        """A power of two near half of the mean number of pairs of a chunk, 8 to 256."""
        mean = self.count // distinct
        return min(256, max(8, 1 << max(0, (mean // 2).bit_length())))

    def tiles(self) -> Iterator[PairTile]:
        """Consecutive blocks with scores of at most `TILE_SCORES` elements."""
        if not self.block:
            start = 0
            for chunk, n in zip(self.chunk.tolist(), self.per_chunk.tolist(), strict=True):
                one, end = self.chunk.new_tensor([chunk]), start + n
                while start < end:
                    block = min(end - start, LARGE_PIECE)
                    yield PairTile(slice(start, start + block), one, block, chunk)
                    start += block
            return
        owner = self.chunk.repeat_interleave(self.blocks)
        step = max(1, TILE_SCORES // (self.block * self.size))
        for a in range(0, len(owner), step):
            b = min(a + step, len(owner))
            yield PairTile(slice(a * self.block, b * self.block), owner[a:b], self.block, -1)
