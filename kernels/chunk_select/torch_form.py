"""Selection of past chunks in plain torch, streamed: never all scores at once.

Axes as in common.py; Q query rows of a group, W nodes that a row keeps, E columns of a table.
"""

import torch
from torch import Tensor

from rwkvx_kernels.chunk_select import common
from rwkvx_kernels.chunk_select.common import FANOUT
from rwkvx_kernels.chunk_select.tree import ChunkTree, TreeOf, by_tree

# Scores of one tile: 4 MB in float32, about the size of two cores' caches.
TILE_SCORES = 1 << 20
# Chunks of a tile: wide enough for an efficient product.
TILE_CHUNKS = 4096
# Numbers of the children that are gathered for a tile of rows of a descent: 64 MB in float32.
TILE_GATHERED = 1 << 24


def select_torch(
    q_NTRD: Tensor, means_NCD: Tensor, trees: TreeOf | None, offset: int, chunk_size: int, topk: int
) -> Tensor:
    """The best `topk - 1` completed past chunks of each query: [N, T, R, topk - 1] int64.

    Every query's choice is its own: it depends on that query, the tree over the chunks of whole
    runs before it and the chunks after them, never on the queries that it is computed with.

    Args:
        q_NTRD: unscaled queries at positions offset ... offset + T - 1.
        means_NCD: of every chunk that is complete by then, at least.
        trees: the tree over so many chunks, asked for in rising order; None scores every chunk.

    Returns:
        Chunk numbers in no particular order; -1 where fewer past chunks exist.
    """
    found = [q_NTRD.new_empty((*q_NTRD.shape[:1], 0, q_NTRD.shape[2], topk - 1), dtype=torch.int64)]
    for part, tree in by_tree(q_NTRD.shape[1], offset, chunk_size, topk, trees):
        arguments = (offset + part.start, chunk_size, topk)
        if tree is None:
            found.append(_flat(q_NTRD[:, part], means_NCD, *arguments))
        else:
            found.append(_descend(q_NTRD[:, part], means_NCD, tree, *arguments))
    return found[-1] if len(found) == 2 else torch.cat(found, dim=1)


def _flat(q_NTRD: Tensor, means_NCD: Tensor, offset: int, chunk_size: int, topk: int) -> Tensor:
    """Of all past chunks."""
    groups, tokens, heads, _ = q_NTRD.shape
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


def _descend(
    q_NTRD: Tensor, means_NCD: Tensor, tree: ChunkTree, offset: int, chunk_size: int, topk: int
) -> Tensor:
    """Of queries whose chunks before the last whole run are those of `tree`."""
    heads, q_NQD = q_NTRD.shape[2], q_NTRD.flatten(1, 2)
    past_Q = (offset + torch.arange(q_NTRD.shape[1], device=q_NQD.device)) // chunk_size
    past_Q = past_Q.repeat_interleave(heads)
    tables = [torch.cat(tree.leaves, dim=1), *tree.nodes]
    row_size = len(q_NQD) * common.beam_widths(topk)[0] * tables[0].shape[2] * FANOUT
    step = max(1, TILE_GATHERED // row_size)
    parts = zip(q_NQD.split(step, dim=1), past_Q.split(step), strict=True)
    found = [_descend_tile(q, past, means_NCD, tree, tables, topk) for q, past in parts]
    return torch.cat(found, dim=1).unflatten(1, (-1, heads))


def _descend_tile(
    q_NQD: Tensor,
    past_Q: Tensor,
    means_NCD: Tensor,
    tree: ChunkTree,
    tables: list[Tensor],
    topk: int,
) -> Tensor:
    """Level by level, the best of the children of what was kept and of members without parent."""
    group = torch.arange(len(q_NQD), device=q_NQD.device)[:, None, None]
    lane = torch.arange(FANOUT, device=q_NQD.device)
    kept, parents = q_NQD.new_empty((*q_NQD.shape[:2], 0), dtype=torch.int64), 0
    for level in range(common.first_level(tree.chunks), -1, -1):
        q_NQE = common.node_queries(q_NQD) if level else q_NQD
        children = torch.einsum("nqe,nqwef->nqwf", q_NQE, tables[level][group, kept]).flatten(2)
        number = (kept.unsqueeze(-1) * FANOUT + lane).flatten(2)
        if level:
            first, members = parents * FANOUT, tree.chunks // FANOUT**level
            others = torch.einsum("nqe,nmef->nqmf", q_NQE, tables[level][:, parents:]).flatten(2)
            others = others[..., : members - first]
        else:
            number = tree.order_NP.gather(1, number.flatten(1)).view_as(number)
            first, members = tree.chunks, int(past_Q[-1])
            others = torch.bmm(q_NQE, means_NCD[:, first:members].transpose(1, 2))
            later = torch.arange(first, members, device=past_Q.device) >= past_Q[:, None]
            others = others.masked_fill(later, -torch.inf)
        rest = torch.arange(first, members, device=number.device)
        number = torch.cat([number, rest.expand(*number.shape[:2], -1)], dim=2)
        scores = torch.cat([children, others], dim=2)
        best = scores.topk(min(common.kept_at(level, topk), scores.shape[2]), dim=2).indices
        kept, parents = number.gather(2, best), members
    return kept
