"""Flat top-k selection of past chunks, streamed: never all scores at once.

Axes: N groups (batch x key/value heads), T tokens, R query heads of a group, C chunks, D head size.
"""

import torch
from torch import Tensor

# Scores of one tile: 4 MB in float32, about the size of two cores' caches.
TILE_SCORES = 1 << 20
# Chunks of a tile: wide enough for an efficient product.
TILE_CHUNKS = 4096


def select_chunks(
    q_NTRD: Tensor, means_NCD: Tensor, offset: int, chunk_size: int, topk: int
) -> Tensor:
    """The best `topk - 1` completed past chunks of each query: [N, T, R, topk - 1] int64.

    Args:
        q_NTRD: unscaled queries at positions offset ... offset + T - 1.
        means_NCD: chunk representatives, at least of every chunk that is complete by then.

    Returns:
        Chunk numbers in no particular order; -1 where fewer past chunks exist.
    """
    groups, tokens, heads, dim = q_NTRD.shape
    slots = topk - 1
    past_T = torch.arange(offset, offset + tokens, device=q_NTRD.device) // chunk_size
    most = int(past_T[-1]) if tokens else 0
    chosen = q_NTRD.new_full((groups, tokens, heads, slots), -1, dtype=torch.int64)
    if slots == 0 or most == 0:
        return chosen
    width = min(most, TILE_CHUNKS)
    rows = max(1, TILE_SCORES // (width * heads * groups))
    for start in range(0, tokens, rows):
        part = slice(start, min(start + rows, tokens))
        q = q_NTRD[:, part].flatten(1, 2)
        limit = past_T[part].repeat_interleave(heads)
        best = _stream(q, means_NCD, limit, slots)
        chosen[:, part] = best.unflatten(1, (-1, heads))
    return chosen


def _stream(q_NQD: Tensor, means_NCD: Tensor, limit_Q: Tensor, slots: int) -> Tensor:
    """Running top-k of one tile of queries over tiles of chunks: [N, Q, slots]."""
    groups, queries, _ = q_NQD.shape
    first, most = int(limit_Q[0]), int(limit_Q[-1])
    value = q_NQD.new_full((groups, queries, slots), -torch.inf)
    index = q_NQD.new_full((groups, queries, slots), -1, dtype=torch.int64)
    for start in range(0, most, TILE_CHUNKS):
        stop = min(start + TILE_CHUNKS, most)
        scores = torch.bmm(q_NQD, means_NCD[:, start:stop].transpose(1, 2))
        if stop > first:  # the chunks that some of these queries have not completed
            chunk = torch.arange(max(first, start), stop, device=scores.device)
            late = scores[:, :, chunk[0] - start :]
            late.masked_fill_(chunk >= limit_Q[:, None], -torch.inf)
        new_value, new_index = top_of_row(scores, slots)
        value, pick = torch.cat([value, new_value], 2).topk(slots, dim=2)
        index = torch.cat([index, new_index + start], 2).gather(2, pick)
    return index.masked_fill_(value == -torch.inf, -1)


def top_of_row(scores: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Top `slots` (or all, if fewer) of the last dimension: values and indices.

    The top-k of a row lie within the top-k of its groups by maximum: exact, and a vectorised
    maximum costs less than a partial sort of the whole row.
    """
    width = scores.shape[-1]
    group_size = int((width / slots) ** 0.5)  # as many groups as members of the chosen groups
    if group_size < 3:
        value, index = scores.topk(min(slots, width), dim=-1)
        return value, index
    columns = width // group_size
    # Group c holds the elements c, c + columns, c + 2 columns, ...: the maximum is vectorised.
    even = scores[..., : columns * group_size].unflatten(-1, (group_size, columns))
    group = even.amax(dim=-2).topk(slots, dim=-1).indices
    member = torch.arange(group_size, device=scores.device)[:, None] * columns
    candidate = (group.unsqueeze(-2) + member).flatten(-2)
    if columns * group_size < width:
        rest = torch.arange(columns * group_size, width, device=scores.device)
        candidate = torch.cat([candidate, rest.expand(*candidate.shape[:-1], -1)], dim=-1)
    value, pick = scores.gather(-1, candidate).topk(slots, dim=-1)
    return value, candidate.gather(-1, pick)
