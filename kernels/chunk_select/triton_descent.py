# mypy: allow-untyped-defs, allow-incomplete-defs
"""Coarse-to-fine selection: the descent of the chunk trees, a level at a time, for many queries.

Neighbouring queries pick different nodes, so nothing is shared by tiles of queries; but a node is
picked by many queries. So the pairs of query and kept node are sorted by node, and a program
multiplies tiles of queries with the children of one node. The scores of a tile of queries,
`FANOUT` for each pair, are held until the best of them are picked (triton_best.py).

Axes and names as in triton_best.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvx_kernels.chunk_select import common
from rwkvx_kernels.chunk_select import forest as forests
from rwkvx_kernels.chunk_select.options import TABLE
from rwkvx_kernels.chunk_select.triton_best import (
    best_members,
    parts_of,
    score_constants,
    scores_of,
)
from rwkvx_kernels.chunk_select.triton_keep import MOST_COLUMNS, columns_of, keep_members
from rwkvx_kernels.tools.triton_lists import (
    MOST_GROUPS,
    lists_of,
    row_of,
    segment_of,
    segments_of,
)
from rwkvx_kernels.tools.triton_options import options_for
from rwkvx_kernels.tools.triton_tiles import finite, load_rows

# Scores held at once: 256 MB.
TILE_SCORES = 1 << 26
# A tile is a multiple of so many queries.
TILE_MULTIPLE = 64


@triton.jit(
    do_not_specialize=[
        "group", "tokens", "pairs", "lists", "parents", "members", "groups", "chunks"
    ]
)  # fmt: skip
def _children_kernel(
    p_q, p_table, p_order, p_kept, p_pairs, p_offsets, p_scores,
    group, tokens, pairs, lists, parents, members, groups, chunks,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    QUERY_PARTS: tl.constexpr, PARTS: tl.constexpr, PRODUCT: tl.constexpr,
    LEVEL: tl.constexpr, WIDTH: tl.constexpr, FANOUT: tl.constexpr, EXTRA: tl.constexpr,
    COLUMNS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A tile of pairs that keep one node: the scores of its children, members of `LEVEL`."""
    i_n = tl.program_id(1).to(tl.int64)
    i_group = group + i_n
    p_pairs += i_n * pairs
    i_entry, begin, end = segment_of(
        tl.program_id(0), p_pairs, p_offsets + i_n * (lists + 1), p_kept, i_group, tokens, pairs,
        lists, TILE, H, G, WIDTH,
    )  # fmt: skip
    if begin >= end:
        return
    o_c, o_d = tl.arange(0, FANOUT), tl.arange(0, BLOCK_D)
    o_place = begin + tl.arange(0, TILE)
    m_pair = o_place < end
    o_pair = tl.load(p_pairs + o_place, mask=m_pair, other=0)
    o_row = row_of(i_group, o_pair, tokens, H, G, WIDTH)
    b_q = finite(load_rows(p_q, o_row, m_pair, o_d, D, D).to(tl.float32))
    i_run, o_in = (i_entry // parents).to(tl.int64), i_entry % parents * FANOUT + o_c
    if LEVEL == 0:
        o_x = i_group * members + tl.load(p_order + (i_run * groups + i_group) * chunks + o_in)
    else:
        o_x = (i_run * groups + i_group) * members + o_in
    b_score = scores_of(
        parts_of(b_q, QUERY_PARTS, PRODUCT), tl.sqrt(tl.sum(b_q * b_q, axis=1)), p_table, o_x,
        o_c >= 0, o_d, LEVEL, D, EXTRA, QUERY_PARTS, PARTS, PRODUCT,
    )  # fmt: skip
    o_out = o_row * COLUMNS + o_pair % WIDTH * FANOUT
    tl.store(p_scores + o_out[:, None] + o_c[None, :], b_score, mask=m_pair[:, None])


def _score_children(
    q: Tensor, table: Tensor, forest: list[Tensor], level: int, kept: Tensor, scores: Tensor
) -> None:
    """Scores of the children, members of `level`, of kept [B, T, H, W] into the first W · FANOUT of
    scores [B, T, H, columns]."""
    order, (runs, groups, parents, _) = forest[0], forest[level + 1].shape
    batch, tokens, heads, width = kept.shape
    options = options_for(TABLE, "children", q.dtype, q.shape[3], q.device)
    for start in range(0, groups, MOST_GROUPS):
        part = range(start, min(groups, start + MOST_GROUPS))
        lists = lists_of(kept, groups // batch, runs * parents + 1, part)
        assert lists is not None
        _children_kernel[(segments_of(lists, options.rows), len(part))](
            q, table, order, kept, *lists, scores, start, tokens, lists.order.shape[1],
            runs * parents + 1, parents, table.shape[2], groups, order.shape[2],
            H=heads, G=groups // batch, **score_constants(q), LEVEL=level, WIDTH=width,
            FANOUT=common.FANOUT, EXTRA=forests.EXTRA, COLUMNS=scores.shape[3],
            TILE=options.rows, **options.launch,
        )  # fmt: skip


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
        place = (first + start, chunk_size, topk)
        chosen[:, start : start + step] = _descend_part(part, means, forest, *place)
    return chosen


def _descend_part(
    q: Tensor, means: Tensor, forest: list[Tensor], first: int, chunk_size: int, topk: int
) -> Tensor:
    """`descend`, a forest, of as many queries as are worked on at once."""
    past = [(first + i) // chunk_size for i in (0, q.shape[1] - 1)]
    tree = past[1] // common.RUN * common.RUN
    top = common.first_level(tree) if tree > common.scored_whole(topk) else 0
    kept: Tensor | None = None
    for level in range(top, -1, -1):
        table, width = forest[level] if level else means, 0 if kept is None else kept.shape[3]
        columns = columns_of(level, width, past[0], past[1], topk)
        keep = level > 0 and columns <= MOST_COLUMNS
        scores = None
        if keep or kept is not None:
            columns = columns if keep else width * common.FANOUT
            scores = q.new_empty((*q.shape[:3], columns), dtype=torch.float32)
        if kept is not None:
            assert scores is not None
            _score_children(q, table, forest, level, kept, scores)
        make = keep_members if keep else best_members
        kept = make(q, table, forest, level, kept, scores, first, chunk_size, topk)  # type: ignore[arg-type]
    assert kept is not None
    return kept
