# mypy: allow-untyped-defs, allow-incomplete-defs
"""Coarse-to-fine selection: the descent of the chunk trees, a level at a time, for many queries.

Neighbouring queries pick different nodes, so nothing is shared by tiles of queries; but a node is
picked by many queries. So the pairs of query and kept node are sorted by node, and a program
multiplies a tile of queries with the children of one node. The scores of a tile of queries,
`FANOUT` for each pair, are held until the best of them are picked (triton_best.py).

Axes and names as in triton_best.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvx_kernels.chunk_select import common
from rwkvx_kernels.chunk_select import forest as forests
from rwkvx_kernels.chunk_select.triton_best import best_members, score_columns, scores_of
from rwkvx_kernels.tools.triton_lists import lists_of, pairs_of, tiles_of
from rwkvx_kernels.tools.triton_tiles import precision

# Scores held at once: 256 MB.
TILE_SCORES = 1 << 26
# A tile is a multiple of so many queries.
TILE_MULTIPLE = 64
# Pairs of a program.
TILE = 64


@triton.jit(do_not_specialize=["parents", "members", "groups", "chunks", "total"])
def _children_kernel(
    p_q, p_table, p_order, p_pairs, p_offsets, p_owner, p_starts, p_scores,
    parents, members, groups, chunks, total,
    D: tl.constexpr, LEVEL: tl.constexpr, WIDTH: tl.constexpr, RUNS: tl.constexpr,
    FANOUT: tl.constexpr, EXTRA: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of pairs that keep one node: the scores of its children, members of `LEVEL`."""
    i_tile = tl.program_id(0)
    i_list = tl.load(p_owner + i_tile).to(tl.int64)
    if i_list >= total:
        return
    o_pair, m_pair = pairs_of(i_tile, i_list, p_pairs, p_offsets, p_starts, TILE)
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
    tiles = tiles_of(lists, TILE)
    shape = (*kept.shape[:3], width * common.FANOUT)
    scores = torch.empty(shape, dtype=torch.float32, device=q.device)
    _children_kernel[(len(tiles.owner),)](
        q, table, order, lists.order, lists.offsets, tiles.owner, tiles.starts, scores, parents,
        table.shape[2], groups, order.shape[2], len(lists.offsets) - 1,
        D=dim, LEVEL=level, WIDTH=width, RUNS=runs, FANOUT=common.FANOUT, EXTRA=forests.EXTRA,
        BLOCK_D=score_columns(dim), TILE=TILE, PRECISION=precision(torch.float32, q.device),
        num_warps=4,
    )  # fmt: skip
    return scores


def descend(
    q: Tensor, means: Tensor, forest: list[Tensor], first: int, chunk_size: int, topk: int
) -> Tensor:
    """The best `topk - 1` completed past chunks of each query: [B, T, H, topk - 1] int32.

    Args:
        q: [B, T, H, D], contiguous, at positions first ... first + T - 1.
        means: [B, G, C, D] float32, contiguous, of every chunk that is complete by then.
        forest: tensors of the forest that has grown over the chunks before the last query's, of
            which those count that a descent of the query's tree visits; [] scores every chunk.

    Returns:
        Chunk numbers, the best first; -1 where fewer past chunks exist.
    """
    if not forest or topk == 1:
        return best_members(q, means, [], 0, None, None, first, chunk_size, topk)
    batch, tokens, heads, _ = q.shape
    chosen = torch.empty((batch, tokens, heads, topk - 1), dtype=torch.int32, device=q.device)
    rows = TILE_SCORES // (max(common.beam_widths(topk)) * common.FANOUT)
    step = max(1, rows // (batch * heads * TILE_MULTIPLE)) * TILE_MULTIPLE
    for start in range(0, tokens, step):
        part = q[:, start : start + step].contiguous()
        chunks = (first + start + part.shape[1] - 1) // chunk_size // common.RUN * common.RUN
        top = common.first_level(chunks) if chunks > common.scored_whole(topk) else 0
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
