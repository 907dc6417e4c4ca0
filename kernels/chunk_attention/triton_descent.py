# mypy: allow-untyped-defs, allow-incomplete-defs
"""Coarse-to-fine selection: the descent of the chunk trees, a level at a time, for many queries.

Neighbouring queries pick different nodes, so nothing is shared by tiles of queries; but a node is
picked by many queries. So the pairs of query and kept node are sorted by node, and a program
multiplies a block of queries with the children of one node. The scores of a tile of queries,
`FANOUT` for each pair, are held until the best of them are picked (triton_select.py).

Axes and names as in triton_select.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvx_kernels.chunk_attention import forest as forests
from rwkvx_kernels.chunk_attention import tree
from rwkvx_kernels.chunk_attention.triton_pairs import blocks_of, lists_of, pairs_of
from rwkvx_kernels.chunk_attention.triton_select import (
    best_members,
    exact_products,
    score_columns,
    scores_of,
    select,
)

# Scores held at once: 256 MB.
TILE_SCORES = 1 << 26
# A tile is a multiple of so many queries.
TILE_MULTIPLE = 64
# Pairs of a block.
BLOCK = 64


@triton.jit(do_not_specialize=["parents", "members", "groups", "chunks", "total"])
def _children_kernel(
    p_q, p_table, p_order, p_pairs, p_offsets, p_owner, p_starts, p_scores,
    parents, members, groups, chunks, total,
    D: tl.constexpr, LEVEL: tl.constexpr, WIDTH: tl.constexpr, RUNS: tl.constexpr,
    FANOUT: tl.constexpr, EXTRA: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of pairs that keep one node: the scores of its children, members of `LEVEL`."""
    i_block = tl.program_id(0)
    i_list = tl.load(p_owner + i_block).to(tl.int64)
    if i_list >= total:
        return
    o_pair, m_pair = pairs_of(i_block, i_list, p_pairs, p_offsets, p_starts, BLOCK)
    o_c = tl.arange(0, FANOUT)
    i_n, i_entry = i_list // (RUNS * parents), i_list % (RUNS * parents)
    i_run, o_in = i_entry // parents, i_entry % parents * FANOUT + o_c
    if LEVEL == 0:
        p_chunk = p_order + (i_run * groups + i_n) * chunks + o_in
        p_x = p_table + (i_n * members + tl.load(p_chunk)) * D
    else:
        p_x = p_table + ((i_run * groups + i_n) * members + o_in) * (D + EXTRA)
    p_rows = p_q + o_pair // WIDTH * D
    b_score = scores_of(p_rows, m_pair, p_x, o_c >= 0, LEVEL, D, BLOCK_D, PRECISION)
    tl.store(p_scores + o_pair[:, None] * FANOUT + o_c[None, :], b_score, mask=m_pair[:, None])


def _score_children(
    q: Tensor, table: Tensor, forest: list[Tensor], level: int, kept: Tensor
) -> Tensor:
    """Scores of the children, members of `level`, of kept [B, T, H, W]: [B, T, H, W · FANOUT]."""
    order, (runs, groups, parents, _) = forest[0], forest[level + 1].shape
    width, dim = kept.shape[3], q.shape[3]
    lists = lists_of(kept, groups // len(q), runs * parents)
    blocks = blocks_of(lists, BLOCK)
    shape = (*kept.shape[:3], width * tree.FANOUT)
    scores = torch.empty(shape, dtype=torch.float32, device=q.device)
    _children_kernel[(len(blocks.owner),)](
        q,
        table,
        order,
        lists.order,
        lists.offsets,
        blocks.owner,
        blocks.starts,
        scores,
        parents,
        table.shape[2],
        groups,
        order.shape[2],
        len(lists.offsets) - 1,
        D=dim,
        LEVEL=level,
        WIDTH=width,
        RUNS=runs,
        FANOUT=tree.FANOUT,
        EXTRA=forests.EXTRA,
        BLOCK_D=score_columns(dim),
        BLOCK=BLOCK,
        PRECISION=exact_products(q),
        num_warps=4,
    )
    return scores


def descend(
    q: Tensor, means: Tensor, forest: list[Tensor], first: int, chunk_size: int, topk: int
) -> Tensor:
    """As `triton_select.select`, of those chunks that a descent of the query's tree comes by.

    Args:
        forest: tensors of the forest that has grown over the chunks before the last query's;
            [] scores every chunk.
    """
    if not forest or topk == 1:
        return select(q, means, first, chunk_size, topk)
    batch, tokens, heads, _ = q.shape
    chosen = torch.empty((batch, tokens, heads, topk - 1), dtype=torch.int32, device=q.device)
    rows = TILE_SCORES // (max(tree.beam_widths(topk)) * tree.FANOUT)
    step = max(1, rows // (batch * heads * TILE_MULTIPLE)) * TILE_MULTIPLE
    for start in range(0, tokens, step):
        part = q[:, start : start + step].contiguous()
        chunks = (first + start + part.shape[1] - 1) // chunk_size // tree.RUN * tree.RUN
        top = tree.first_level(chunks) if chunks > tree.scored_whole(topk) else 0
        kept: Tensor | None = None
        scores: Tensor | None = None
        for level in range(top, -1, -1):
            table = forest[level] if level else means
            if kept is not None:
                scores = _score_children(part, table, forest, level, kept)
            place = (level, kept, scores, first + start, chunk_size, topk)
            kept = best_members(part, table, forest, *place)
        assert kept is not None
        chosen[:, start : start + step] = kept
    return chosen
