# mypy: allow-untyped-defs, allow-incomplete-defs
"""The nodes that a query keeps of a level: many, of not too many candidates, in no order.

All scores of a level are written down, those of members without parent behind those of children
(triton_descent.py). Then a row stands in registers as integers that sort like scores, and the
value that as many of them reach as are kept is found bit by bit: 32 counts, however many are kept.
Of equal scores those of smaller columns are kept.

Axes and names as in triton_best.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvx_kernels.chunk_select import common
from rwkvx_kernels.chunk_select.options import TABLE
from rwkvx_kernels.chunk_select.triton_best import (
    entry_of,
    first_level,
    parts_of,
    run_of,
    score_constants,
    scores_of,
    sortable,
    tree_constants,
    tree_size,
)
from rwkvx_kernels.tools.sizes import next_power_of_2
from rwkvx_kernels.tools.triton_options import options_for
from rwkvx_kernels.tools.triton_tiles import finite, load_rows

# Scores of a row: what fits into registers; a warp's, of so few queries that all are in one run.
MOST_COLUMNS, LEAST_COLUMNS = 2048, 128
LEAST: tl.constexpr = tl.constexpr(-0x80000000)


@triton.jit
def _tile_of(
    first, tokens, rows,
    H: tl.constexpr, G: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """A program's queries of one head: position of the first, which exist, their rows, group."""
    i_tile, i_row = tl.program_id(0) // rows, tl.program_id(0) % rows
    i_b, i_h = (i_row // H).to(tl.int64), i_row % H
    start = (first // BLOCK_Q + i_tile) * BLOCK_Q
    o_t = start + tl.arange(0, BLOCK_Q) - first
    m_t = (o_t >= 0) & (o_t < tokens)
    return start, m_t, (i_b * tokens + o_t) * H + i_h, i_b * G + i_h // (H // G)


@triton.jit
def _members_of(P, top, LEVEL: tl.constexpr, FANOUT: tl.constexpr):
    """Members without parent, the first and one past the last, where queries descend from `top`."""
    root = tl.where(top > LEVEL, P // FANOUT ** (LEVEL + 1) * FANOUT, 0)
    return root, tl.where(top < LEVEL, 0, P // FANOUT**LEVEL)


@triton.jit(do_not_specialize=["first", "tokens", "members", "groups", "rows"])
def _scores_kernel(
    p_q, p_table, p_scores, first, tokens, members, groups, rows,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr, LEVEL: tl.constexpr, CHILDREN: tl.constexpr,
    RUNS: tl.constexpr, LEVELS: tl.constexpr, RUN: tl.constexpr, GROWTH: tl.constexpr,
    FANOUT: tl.constexpr, EXTRA: tl.constexpr, DENSE: tl.constexpr, WHOLE: tl.constexpr,
    QUERY_PARTS: tl.constexpr, PARTS: tl.constexpr, PRODUCT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Scores of the members without parent, from column `CHILDREN` of each query's row on."""
    start, m_t, o_row, i_n = _tile_of(first, tokens, rows, H, G, BLOCK_Q)
    P = tree_size(start // CHUNK, LEVELS, RUN, WHOLE)
    root, stop = _members_of(P, first_level(P, LEVELS, FANOUT, DENSE), LEVEL, FANOUT)
    o_d = tl.arange(0, BLOCK_D)
    b_q = finite(load_rows(p_q, o_row, m_t, o_d, D, D).to(tl.float32))
    b_norm = tl.sqrt(tl.sum(b_q * b_q, axis=1))
    q_parts = parts_of(b_q, QUERY_PARTS, PRODUCT)
    for i_c in range(root, stop, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        o_run = run_of(o_c * FANOUT**LEVEL, P, RUNS, RUN, GROWTH)
        o_place = (o_run.to(tl.int64) * groups + i_n) * members + o_c
        b_score = scores_of(
            q_parts, b_norm, p_table, o_place, o_c < stop, o_d, LEVEL, D, EXTRA, QUERY_PARTS,
            PARTS, PRODUCT,
        )  # fmt: skip
        p_out = p_scores + o_row[:, None] * COLUMNS + CHILDREN + (o_c - root)[None, :]
        tl.store(p_out, b_score, mask=m_t[:, None] & (o_c < stop)[None, :])


@triton.jit(do_not_specialize=["first", "tokens", "members", "parents", "groups", "rows"])
def _keep_kernel(
    p_scores, p_parents, p_kept, first, tokens, members, parents, groups, rows,
    H: tl.constexpr, G: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr,
    SLOTS: tl.constexpr, BLOCK_S: tl.constexpr, CHUNK: tl.constexpr, LEVEL: tl.constexpr,
    WIDTH: tl.constexpr, RUNS: tl.constexpr, LEVELS: tl.constexpr, RUN: tl.constexpr,
    GROWTH: tl.constexpr, FANOUT: tl.constexpr, EXTRA: tl.constexpr, DENSE: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Entries of the `SLOTS` best of each row, in the order of their columns; -1 for none."""
    start, m_t, o_row, i_n = _tile_of(first, tokens, rows, H, G, BLOCK_Q)
    P = tree_size(start // CHUNK, LEVELS, RUN, WHOLE)
    top = first_level(P, LEVELS, FANOUT, DENSE)
    root, stop = _members_of(P, top, LEVEL, FANOUT)
    o_c = tl.arange(0, BLOCK_C)[None, :]
    m_c = (o_c >= WIDTH * FANOUT) & (o_c < WIDTH * FANOUT + stop - root)
    if WIDTH > 0:
        m_child = m_t[:, None] & (o_c < tl.where(top > LEVEL, WIDTH * FANOUT, 0))
        p_parent = p_parents + o_row[:, None] * WIDTH + o_c // FANOUT
        m_c |= m_child & (tl.load(p_parent, mask=m_child, other=-1) >= 0)
    m_c &= m_t[:, None]
    b_score = tl.load(p_scores + o_row[:, None] * COLUMNS + o_c, mask=m_c, other=0.0)
    b_key = tl.where(m_c, sortable(b_score), LEAST)
    b_least = tl.full((BLOCK_Q,), LEAST, tl.int32)
    for bit in range(32):
        b_try = b_least ^ (LEAST if bit == 0 else 1 << (31 - bit))
        count = tl.sum((b_key >= b_try[:, None]).to(tl.int32), axis=1)
        b_least = tl.where(count >= SLOTS, b_try, b_least)
    m_above = m_c & (b_key > b_least[:, None])
    m_equal = m_c & (b_key == b_least[:, None])
    room = SLOTS - tl.sum(m_above.to(tl.int32), axis=1)
    m_kept = m_above | (m_equal & (tl.cumsum(m_equal.to(tl.int32), axis=1) <= room[:, None]))
    o_slot = tl.cumsum(m_kept.to(tl.int32), axis=1) - 1
    b_entry = entry_of(
        o_c + o_slot * 0, None, p_parents, o_row[:, None], m_t[:, None], i_n, root, P, members,
        parents, groups, 1, LEVEL, WIDTH, RUNS, RUN, GROWTH, FANOUT,
    )  # fmt: skip
    tl.store(p_kept + o_row[:, None] * SLOTS + o_slot, b_entry, mask=m_kept)
    o_s = tl.arange(0, BLOCK_S)[None, :]
    m_none = m_t[:, None] & (o_s < SLOTS) & (o_s >= tl.sum(m_kept.to(tl.int32), axis=1)[:, None])
    tl.store(p_kept + o_row[:, None] * SLOTS + o_s, -1, mask=m_none)


def columns_of(level: int, width: int, first: int, last: int, topk: int) -> int:
    """The most candidates of a level that a query behind `first` ... `last` chunks has, of whose
    `width` nodes above the children are among them."""
    most = 0
    for chunks in range(first // common.RUN, last // common.RUN + 1):
        tree = chunks * common.RUN
        top = common.first_level(tree) if tree > common.scored_whole(topk) else 0
        if level <= top:
            above = common.FANOUT ** (level + 1)
            root = tree // above * common.FANOUT if level < top else 0
            most = max(most, tree // common.FANOUT**level - root)
    return width * common.FANOUT + most


def keep_members(
    q: Tensor, table: Tensor, forest: list[Tensor], level: int, kept: Tensor | None,
    scores: Tensor, first: int, chunk_size: int, topk: int,
) -> Tensor:  # fmt: skip
    """The nodes of a level that queries keep: [B, T, H, slots] int32 entries, -1 for none.

    Args:
        q, table, forest, kept, first: as for `triton_best.best_members`.
        scores: [B, T, H, columns] float32, in the first of which are those of the children of
            `kept`; those of other members are written behind.
    """
    batch, tokens, heads, dim = q.shape
    slots, groups = common.kept_at(level, topk), forest[0].shape[1] // batch
    width, columns = 0 if kept is None else kept.shape[3], scores.shape[3]
    found = q.new_empty((batch, tokens, heads, slots), dtype=torch.int32)
    rows, members = batch * heads, table.shape[2]
    constants = {
        "H": heads, "G": groups, "COLUMNS": columns, "CHUNK": chunk_size, "LEVEL": level,
        **tree_constants(forest, topk),
    }  # fmt: skip

    def programs(block: int) -> tuple[int]:
        return (((first + tokens - 1) // block - first // block + 1) * rows,)

    options = options_for(TABLE, "level", q.dtype, dim, q.device)
    _scores_kernel[programs(options.rows)](
        q, table, scores, first, tokens, members, batch * groups, rows, **constants,
        **score_constants(q), CHILDREN=width * common.FANOUT, BLOCK_Q=options.rows,
        BLOCK_C=options.columns, **options.launch,
    )  # fmt: skip
    options = options_for(TABLE, "keep", q.dtype, dim, q.device)
    block = max(LEAST_COLUMNS, next_power_of_2(columns))
    queries = max(1, options.rows // block)
    parents = forest[level + 1].shape[2] if width else 1
    _keep_kernel[programs(queries)](
        scores, kept, found, first, tokens, members, parents, batch * groups, rows, **constants,
        BLOCK_C=block, SLOTS=slots, BLOCK_S=next_power_of_2(slots), WIDTH=width, BLOCK_Q=queries,
        **options.launch,
    )  # fmt: skip
    return found
