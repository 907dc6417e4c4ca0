"""Coarse-to-fine selection of past chunks: a descent of the chunk tree, many queries at once.

Every query's choice is its own: it depends on that query, the tree over the chunks of whole runs
before it and the chunks after them, never on the queries that it is computed with.

Axes as in cpu_select.py; Q query rows of a group, E table columns, F children of a node, K nodes.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rwkvx_kernels.chunk_attention.cpu_select import TILE_SCORES, select_chunks, top_of_row
from rwkvx_kernels.chunk_attention.tree import FANOUT, RUN, ChunkTree, beam_widths, box_queries

TreeOf = Callable[[int], ChunkTree]
# Gathered queries of one batch of products: 4 MB in float32 (less, and threads mostly meet).
TILE_ELEMENTS = 1 << 20
# Query rows that descend together: enough of them meet in each node of a tree of a million tokens.
TILE_ROWS = 1 << 13
# So few rows read their nodes directly; more are sorted by node, so that products are large.
FEW_ROWS = 16


def select(
    q_NTRD: Tensor,
    means_NCD: Tensor,
    trees: TreeOf | None,
    offset: int,
    chunk_size: int,
    topk: int,
) -> Tensor:
    """The `topk - 1` past chunks of each query: [N, T, R, topk - 1], as `select_chunks`.

    Args:
        trees: the tree over so many chunks of `means_NCD`, asked for in rising order; None scores
            every past chunk.
    """
    tokens = q_NTRD.shape[1]
    if trees is None or topk == 1:
        return select_chunks(q_NTRD, means_NCD, offset, chunk_size, topk)
    chosen, start = [], 0
    while start < tokens:
        chunks = (offset + start) // chunk_size // RUN * RUN
        stop = min(tokens, (chunks + RUN) * chunk_size - offset)
        if chunks <= FANOUT * beam_widths(topk)[0]:
            part = q_NTRD[:, start:stop]
            chosen.append(select_chunks(part, means_NCD, offset + start, chunk_size, topk))
        else:
            tree = trees(chunks)
            step = max(1, TILE_ROWS // (q_NTRD.shape[0] * q_NTRD.shape[2]))
            for a in range(start, stop, step):
                part = q_NTRD[:, a : min(a + step, stop)]
                chosen.append(_select(part, means_NCD, tree, offset + a, chunk_size, topk))
        start = stop
    return torch.cat(chosen, dim=1)


def _select(
    q_NTRD: Tensor, means_NCD: Tensor, tree: ChunkTree, offset: int, chunk_size: int, topk: int
) -> Tensor:
    """Of queries whose chunks before the last whole run are those of `tree`: [N, T, R, slots]."""
    groups, tokens, heads, _ = q_NTRD.shape
    q_NQD = q_NTRD.flatten(1, 2)
    q_NQE = box_queries(q_NQD)
    kept: Tensor | None = None  # None: all nodes of the level above
    for level in range(tree.first_level, 0, -1):
        boxes = tree.boxes[level - 1]
        width = beam_widths(topk)[level > 1]
        if kept is not None:
            whole = tree.boxes[level].shape[1] * FANOUT  # what follows has no parent
            members = torch.arange(whole, device=boxes.device).expand(groups, -1)
            children = _score_children(q_NQE, kept, members, boxes)
            best = _best(q_NQE, children, boxes[:, whole:], width)
            kept = _children_of(kept, best, whole)
        elif boxes.shape[1] > width:
            kept = _best(q_NQE, None, boxes, width)
    assert kept is not None  # fewer chunks are not selected by descent
    past_T = torch.arange(offset, offset + tokens, device=q_NQD.device) // chunk_size
    late = torch.arange(tree.chunks, int(past_T[-1]), device=q_NQD.device)
    unfinished = late >= past_T.repeat_interleave(heads)[:, None]
    children = _score_children(q_NQD, kept, tree.order_NP, means_NCD)
    tail = means_NCD[:, tree.chunks : tree.chunks + len(late)]
    best = _best(q_NQD, children, tail, topk - 1, unfinished)
    place = _children_of(kept, best, tree.chunks)
    order = torch.cat([tree.order_NP, late.expand(groups, -1)], dim=1)
    return order.gather(1, place.flatten(1)).view(groups, tokens, heads, topk - 1)


def _children_of(kept_NQK: Tensor, pick: Tensor, parentless: int) -> Tensor:
    """The nodes at columns `pick` of what `_best` compared; those without parent come last."""
    beyond = kept_NQK.shape[2] * FANOUT
    column = torch.div(pick, FANOUT, rounding_mode="trunc").clamp_max_(kept_NQK.shape[2] - 1)
    child = (kept_NQK.gather(2, column) - column).mul_(FANOUT).add_(pick)
    return torch.where(pick < beyond, child, pick - (beyond - parentless))


class Children(NamedTuple):
    """Scores of the children of each query's nodes: rows place_NQK of scores_LF."""

    scores_LF: Tensor
    place_NQK: Tensor


def _best(
    q_NQE: Tensor,
    children: Children | None,
    others_NXE: Tensor,
    slots: int,
    hidden_QX: Tensor | None = None,
) -> Tensor:
    """Columns of the best of each query's `children` followed by `others_NXE`: [N, Q, slots]."""
    groups, queries, _ = q_NQE.shape
    best = torch.empty((groups, queries, slots), dtype=torch.int64, device=q_NQE.device)
    width = others_NXE.shape[1]
    if children is not None:
        width += children.place_NQK.shape[2] * FANOUT
    step = max(1, 2 * TILE_SCORES // (groups * width))
    for a in range(0, queries, step):
        rows = slice(a, a + step)
        scores = torch.bmm(q_NQE[:, rows], others_NXE.transpose(1, 2))
        if hidden_QX is not None:
            scores.masked_fill_(hidden_QX[rows], torch.finfo(scores.dtype).min)
        if children is not None:
            place = children.place_NQK[:, rows]
            own = children.scores_LF.index_select(0, place.flatten())
            scores = torch.cat([own.view(*place.shape[:2], -1), scores], dim=2)
        best[:, rows] = top_of_row(scores, slots)[1]
    return best


def _score_children(
    q_NQE: Tensor, node_NQK: Tensor, members_NP: Tensor, table_NLE: Tensor
) -> Children:
    """Products of each query with the children of its own K nodes.

    Pairs of query and node are sorted by node, so that a node's children meet all of its queries
    in one product; blocks of equal length share a batched product.

    Args:
        members_NP: the rows of `table_NLE` that are children, those of node i from i · FANOUT on.
    """
    groups, queries, width = node_NQK.shape
    dim, device = q_NQE.shape[2], q_NQE.device
    first = torch.arange(groups, device=device)[:, None]
    members_MF = (members_NP + first * table_NLE.shape[1]).view(-1, FANOUT)
    table, nodes = table_NLE.flatten(0, 1), members_NP.shape[1] // FANOUT
    node = (node_NQK.flatten(1) + first * nodes).flatten()
    if groups * queries <= FEW_ROWS:
        rows = table.index_select(0, members_MF[node].flatten()).view(groups * queries, -1, dim)
        scores = torch.bmm(rows, q_NQE.reshape(-1, dim, 1)).view(-1, FANOUT)
        return Children(scores, torch.arange(len(node), device=device).view(node_NQK.shape))
    q_rows = q_NQE.reshape(-1, dim)
    node, order = node.to(torch.int32).sort(stable=True)  # by radix
    count = torch.bincount(node, minlength=len(members_MF))
    mean = len(node) // int((count > 0).sum())
    block = min(256, max(8, 1 << max(0, (mean // 2).bit_length())))
    blocks = -(-count // block)
    shift = (blocks.cumsum(0) - blocks) * block - (count.cumsum(0) - count)
    owner = torch.arange(len(members_MF), device=device).repeat_interleave(blocks)
    place = torch.arange(len(node), device=device) + shift[node]
    rows = torch.zeros(len(owner) * block, dtype=torch.int64, device=device)
    rows[place] = torch.div(order, width, rounding_mode="trunc")
    scores = q_rows.new_empty((len(owner), block, FANOUT))
    step = max(1, TILE_ELEMENTS // (block * dim))
    q_tile = q_rows.new_empty((step * block, dim))  # written again and again: it stays in the cache
    for a in range(0, len(owner), step):
        part = owner[a : a + step]
        q = q_tile[: len(part) * block]
        torch.index_select(q_rows, 0, rows[a * block : (a + len(part)) * block], out=q)
        children = table.index_select(0, members_MF.index_select(0, part).flatten())
        torch.bmm(
            q.view(-1, block, dim),
            children.view(-1, FANOUT, dim).transpose(1, 2),
            out=scores[a : a + len(part)],
        )
    back = torch.empty_like(place)
    back[order] = place
    return Children(scores.view(-1, FANOUT), back.view(node_NQK.shape))
