"""Top-k chunk attention of one part of a sequence, of which other processes read the rest.

A chunk may be the best of the whole sequence and lie anywhere: means of all chunks are gathered,
each query chooses among them, and the chosen chunks alone are fetched.
Axes: B batch, T time, H query heads, G key/value heads, N head size, S tokens of a chunk.
"""

import torch
from torch import Tensor

from rwkvx.sequence import SequenceParallel
from rwkvx_kernels.chunk_attention import attend_chunks
from rwkvx_kernels.chunk_select import chunk_means, select_chunks


def attend_part(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    topk: int,
    selection: str,
    impl: str,
    sequence: SequenceParallel,
) -> Tensor:
    """`chunk_attention` of the whole sequence for the own queries q [B, T, H, N], differentiable.

    k, v [B, T, G, N]: of the own tokens, a multiple of `chunk_size` as in every process.
    """
    rows, tokens, heads, _ = q.shape
    own, groups = tokens // chunk_size, k.shape[2]
    first = sequence.rank * own
    means = sequence.gathered(chunk_means(k.detach().transpose(1, 2), chunk_size), dim=2)
    where = (first * chunk_size, selection, impl)
    chosen = select_chunks(q.detach(), means, chunk_size, topk, *where).long()

    # Each key/value head of each row fetches what its own queries chose.
    total = means.shape[2]
    row = torch.arange(rows, device=q.device).view(-1, 1, 1, 1)
    group = (torch.arange(heads, device=q.device) // (heads // groups)).view(1, 1, -1, 1)
    pair = row * groups + group
    foreign = (chosen >= 0) & (chosen < first)
    keys = (pair * total + chosen).where(foreign, -1)
    wanted = keys[foreign].unique()  # sorted by pair, then chunk
    pair_of, chunk_of = wanted // total, wanted % total
    owners, order = torch.sort(chunk_of // own, stable=True)
    numbers = (pair_of * own + chunk_of % own)[order]

    both = torch.cat([k, v], dim=-1)  # [B, T, G, 2N] -> [B·G·chunks, S, 2N]
    chunks = both.unflatten(1, (own, chunk_size)).permute(0, 3, 1, 2, 4)
    came = sequence.fetched(chunks.flatten(0, 2), numbers, owners)
    counts = torch.bincount(pair_of, minlength=rows * groups)
    most = int(counts.max())
    start = counts.cumsum(0) - counts
    place = torch.arange(len(wanted), device=q.device) - start[pair_of]
    slots = (pair_of * most + place)[order]
    fetched = came.new_zeros(rows * groups * most, *came.shape[1:]).index_copy(0, slots, came)
    fetched = fetched.view(rows, groups, most, *came.shape[1:])

    # [B, G, fetched and own chunks, S, 2N] -> [B, tokens, G, 2N]
    joined = torch.cat([fetched, chunks], dim=2).flatten(2, 3).transpose(1, 2)
    k_all, v_all = joined.split(k.shape[-1], dim=-1)
    found = torch.searchsorted(wanted, keys.contiguous()) - start[pair]
    local = (chosen - first + most).where(chosen >= 0, -1)
    return attend_chunks(q, k_all, v_all, found.where(foreign, local), chunk_size, impl)
