# mypy: allow-untyped-defs, allow-incomplete-defs
"""Inverted lists: of a choice of chunks (or nodes) by each query, which queries chose a chunk.

Everything has a size that is known without looking at the choice, so that nothing waits for the
device and graphs can hold it.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Lists(NamedTuple):
    """The pairs of (query row, slot), sorted by the chunk that they read (compressed rows).

    The number of a pair is row · slots + slot, that of a row (b · T + t) · H + h, that of a chunk
    (b · G + g) · C + c.

    Attributes:
        order: [P] int64 pairs by chunk, in order of their numbers within a chunk.
        offsets: [chunks + 1] int64: the pairs of a chunk are order[offsets[i] : offsets[i + 1]].
    """

    order: Tensor
    offsets: Tensor


class Tiles(NamedTuple):
    """Every chunk's list cut into tiles of at most so many pairs, one for a program.

    Attributes:
        owner: [tiles at most] int32: the chunk of each tile; their number beyond the last tile.
        starts: [chunks + 1] int64: the first tile of each chunk.
    """

    owner: Tensor
    starts: Tensor


def lists_of(chosen: Tensor, groups: int, chunks: int) -> Lists:
    """Invert chosen [B, T, H, slots] (-1: none), for `chunks` chunks of each of G heads."""
    batch, _, heads, _ = chosen.shape
    total = batch * groups * chunks
    # Sorting takes a pass for each byte of a number.
    narrow = torch.int32 if total < 2**31 else torch.int64
    b = torch.arange(batch, device=chosen.device, dtype=narrow).view(-1, 1, 1, 1)
    g = (torch.arange(heads, device=chosen.device, dtype=narrow) // (heads // groups)).view(-1, 1)
    number = ((b * groups + g) * chunks + chosen).masked_fill(chosen < 0, total)
    number, order = number.flatten().sort(stable=True)
    every = torch.arange(total + 1, device=chosen.device, dtype=narrow)
    return Lists(order, torch.searchsorted(number, every))


def tiles_of(lists: Lists, size: int) -> Tiles:
    """Cut the lists into tiles of at most `size` pairs."""
    total = len(lists.offsets) - 1
    per_chunk = (lists.offsets.diff() + (size - 1)) // size
    starts = torch.nn.functional.pad(per_chunk.cumsum(0), (1, 0))
    most = len(lists.order) // size + min(total, len(lists.order))
    every = torch.arange(most, device=starts.device)
    owner = torch.searchsorted(starts[1:], every, right=True)
    return Tiles(owner.to(torch.int32), starts)


@triton.jit
def pairs_of(i_tile, i_chunk, p_order, p_offsets, p_starts, TILE: tl.constexpr):
    """The pairs of a tile of a chunk's list, and which of them there are."""
    o_pair = tl.load(p_offsets + i_chunk) + (i_tile - tl.load(p_starts + i_chunk)) * TILE
    o_pair += tl.arange(0, TILE)
    m_pair = o_pair < tl.load(p_offsets + i_chunk + 1)
    return tl.load(p_order + o_pair, mask=m_pair, other=0), m_pair
