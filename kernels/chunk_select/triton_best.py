# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"
"""The best of many candidates: chunk means, or nodes of a tree, streamed past a tile of queries.

Flat selection is this once, with all past chunks for candidates. Coarse-to-fine selection
(triton_descent.py) does it level by level: candidates are the children of the nodes that a query
kept, whose scores it reads, and then the members of the level that have no parent.

The lists of the best stand in registers, sorted; a tile of scores goes through as many rounds as
one of its queries has newcomers, after the first tiles few. Of equal scores the first one stays.
Beside queries of 8 or 11 bits a score is an integer that sorts like it, with its place in the tile
for its last bits (6 of a tile of 64): the largest says where it stands. That cuts scores to 18
bits, what their products have (a mean is two numbers of 8 bits). Scores of float32 stay whole, and
are looked for.
Longer lists than `options.MOST_KEPT` are made in passes: each has what comes after the one before.

Axes: B batch, T queries, H query heads, G key/value heads, C chunks, D head size, S lengths of
runs, N = B·G, M nodes of a level. Names: i_ index, p_ pointer, b_ tile in registers, o_ offset, m_
mask. A program has `BLOCK_Q` queries of one head. P is the number of chunks in a query's tree; the
entry of a member of level 1 or higher is run · M + member (forest.py), that of a chunk its number.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvx_kernels.chunk_select import common
from rwkvx_kernels.chunk_select import forest as forests
from rwkvx_kernels.chunk_select.options import MOST_KEPT, TABLE
from rwkvx_kernels.tools.sizes import ceil_div, next_power_of_2
from rwkvx_kernels.tools.triton_device import interpreted
from rwkvx_kernels.tools.triton_options import options_for
from rwkvx_kernels.tools.triton_tiles import finite, load_rows

# Of so many numbers of 8 bits is a query made, and what it is multiplied with: products of both
# whose sum matters are taken by matrix instructions for bfloat16.
PARTS = {torch.bfloat16: (1, 2), torch.float16: (2, 2), torch.float32: (3, 3)}


def tree_constants(forest: list[Tensor], topk: int) -> dict[str, int]:
    """Compile-time constants of the trees in `forest` (forest.py); all are empty if it is []."""
    return {
        "RUNS": len(forest[0]) if forest else 0,
        "LEVELS": common.first_level(forest[0].shape[2]) if forest else 0,
        "RUN": common.RUN,
        "GROWTH": common.GROWTH,
        "FANOUT": common.FANOUT,
        "EXTRA": forests.EXTRA,
        "DENSE": common.DENSE_NODES,
        "WHOLE": common.scored_whole(topk),
    }


def score_constants(q: Tensor) -> dict[str, Any]:
    """Compile-time constants of `scores_of`. The interpreter multiplies no bfloat16."""
    query_parts, parts = PARTS[q.dtype]
    return {
        "D": q.shape[3],
        "BLOCK_D": max(16, next_power_of_2(q.shape[3])),
        "QUERY_PARTS": query_parts,
        "PARTS": parts,
        "PRODUCT": tl.float32 if interpreted() else tl.bfloat16,
    }


@triton.jit
def tree_size(past, LEVELS: tl.constexpr, RUN: tl.constexpr, WHOLE: tl.constexpr):
    """P for a query behind `past` chunks; 0 where all of them are scored."""
    if LEVELS == 0:
        return past * 0
    return tl.where(past // RUN * RUN > WHOLE, past // RUN * RUN, 0)


@triton.jit
def first_level(P, LEVELS: tl.constexpr, FANOUT: tl.constexpr, DENSE: tl.constexpr):
    """Where the descent starts: the lowest level of few nodes, or else the highest; 0 if P is."""
    level = (P > 0).to(tl.int32)
    for i in tl.static_range(1, LEVELS):
        level += ((P // FANOUT**i > DENSE) & (FANOUT ** (i + 1) <= P)).to(tl.int32)
    return level


@triton.jit
def run_of(o_chunk, P, RUNS: tl.constexpr, RUN: tl.constexpr, GROWTH: tl.constexpr):
    """Which length of run position `o_chunk` lies in, in the tree over the first P chunks."""
    o_run = o_chunk * 0
    for i in tl.static_range(1, RUNS):
        o_run += (o_chunk < P // (RUN * GROWTH**i) * (RUN * GROWTH**i)).to(o_run.dtype)
    return o_run


@triton.jit
def parts_of(b_x, PARTS: tl.constexpr, PRODUCT: tl.constexpr):
    """Float32 as a sum of numbers of 8 bits, the largest first."""
    parts = ()
    for _ in tl.static_range(PARTS):
        b_part = b_x.to(tl.bfloat16)
        parts = parts + (b_part.to(PRODUCT),)  # noqa: RUF005
        b_x = b_x - b_part.to(tl.float32)
    return parts


@triton.jit
def scores_of(
    q_parts, b_norm, p_table, o_place, m_place, o_d,
    LEVEL: tl.constexpr, D: tl.constexpr, EXTRA: tl.constexpr,
    QUERY_PARTS: tl.constexpr, PARTS: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Products of queries with chunk means, or with nodes (`common.node_queries`): float32."""
    WIDE: tl.constexpr = D if LEVEL == 0 else D + EXTRA
    x_parts = parts_of(load_rows(p_table, o_place, m_place, o_d, WIDE, D), PARTS, PRODUCT)
    b_score = tl.zeros((q_parts[0].shape[0], o_place.shape[0]), tl.float32)
    for i_small in tl.static_range(PARTS):  # the smallest products first
        for i in tl.static_range(QUERY_PARTS):
            if PARTS - 1 - i_small - i >= 0:
                b_x = tl.trans(x_parts[PARTS - 1 - i_small - i])
                b_score = tl.dot(q_parts[i], b_x, b_score, input_precision="ieee")
    if LEVEL > 0:
        b_radius = tl.load(p_table + o_place * WIDE + D, mask=m_place, other=0.0)
        b_score += b_norm[:, None] * b_radius[None, :]
    return b_score


@triton.jit
def sortable(b_score):
    """Float32 as integers in the same order; NaN comes before all."""
    b_bits = b_score.to(tl.int32, bitcast=True)
    b_key = b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)
    return tl.where(b_score == b_score, b_key, -0x80000000)


@triton.jit
def _insert(scores, columns, b_score, b_column, K: tl.constexpr):
    """Into sorted lists, where it is among the best; after its equals."""
    new_scores, new_columns = (), ()
    for i in tl.static_range(K):
        b_in, b_at = b_score, b_column
        if i > 0:
            m_shift = b_score > scores[i - 1]
            b_in = tl.where(m_shift, scores[i - 1], b_score)
            b_at = tl.where(m_shift, columns[i - 1], b_column)
        m_new = b_score > scores[i]
        new_scores = new_scores + (tl.where(m_new, b_in, scores[i]),)  # noqa: RUF005
        new_columns = new_columns + (tl.where(m_new, b_at, columns[i]),)  # noqa: RUF005
    return new_scores, new_columns


@triton.jit
def _empty(BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr, PACKED: tl.constexpr):
    """What a list holds where it has nothing: below every score but NaN."""
    b_least = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    if PACKED:
        b_least = sortable(b_least) & -BLOCK_C
    return b_least


@triton.jit
def _meet(
    scores, columns, b_score, o_column, last,
    K: tl.constexpr, AFTER: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Lists of the best meet a tile of scores, -inf for none, in the order of their columns.

    last: scores and columns that all come after, in a later pass.
    """
    BLOCK_C: tl.constexpr = o_column.shape[0]
    if PACKED:
        o_last = BLOCK_C - 1 - tl.arange(0, BLOCK_C)
        b_score = sortable(b_score) & -BLOCK_C
    if AFTER:
        b_last, b_last_column = last
        m_later = (b_score == b_last[:, None]) & (o_column[None, :] > b_last_column[:, None])
        m_later |= b_score < b_last[:, None]
        b_score = tl.where(m_later, b_score, _empty(1, BLOCK_C, PACKED)[:, None])
    if PACKED:
        first = tl.min(o_column, axis=0)
        b_score = b_score | o_last[None, :]
        b_top = tl.max(b_score, axis=1)
        while tl.max(((b_top & -BLOCK_C) > scores[K - 1]).to(tl.int32), axis=0) > 0:
            b_column = first + (BLOCK_C - 1 - (b_top & (BLOCK_C - 1)))
            scores, columns = _insert(scores, columns, b_top & -BLOCK_C, b_column, K)
            b_score = tl.where(b_score == b_top[:, None], -0x80000000, b_score)
            b_top = tl.max(b_score, axis=1)
    else:
        b_top = tl.max(b_score, axis=1)
        while tl.max((b_top > scores[K - 1]).to(tl.int32), axis=0) > 0:
            m_top = b_score == b_top[:, None]
            b_column = tl.min(tl.where(m_top, o_column[None, :], 0x7FFFFFFF), axis=1)
            scores, columns = _insert(scores, columns, b_top, b_column, K)
            b_score = tl.where(o_column[None, :] == b_column[:, None], float("-inf"), b_score)
            b_top = tl.max(b_score, axis=1)
    return scores, columns


@triton.jit
def entry_of(
    b_column, p_order, p_kept, o_row, m_t, i_n, root, P, members, parents, groups, chunks,
    LEVEL: tl.constexpr, WIDTH: tl.constexpr, RUNS: tl.constexpr, RUN: tl.constexpr,
    GROWTH: tl.constexpr, FANOUT: tl.constexpr,
):  # fmt: skip
    """The entries that stand in columns: of children, and then of members without parent."""
    o_member = b_column - WIDTH * FANOUT + root
    b_entry = o_member
    if LEVEL > 0:
        b_entry += run_of(o_member * FANOUT**LEVEL, P, RUNS, RUN, GROWTH) * members
    if WIDTH > 0:
        m_child = (b_column >= 0) & (b_column < WIDTH * FANOUT) & m_t
        b_parent = tl.load(p_kept + o_row * WIDTH + b_column // FANOUT, mask=m_child, other=0)
        o_run, o_in = b_parent // parents, b_parent % parents * FANOUT + b_column % FANOUT
        if LEVEL > 0:
            b_child = o_run * members + o_in
        else:
            o_place = (o_run.to(tl.int64) * groups + i_n) * chunks + o_in
            b_child = tl.load(p_order + o_place, mask=m_child, other=0)
        b_entry = tl.where(m_child, b_child, b_entry)
    return tl.where(b_column >= 0, b_entry, -1)


@triton.jit(do_not_specialize=["first", "tokens", "members", "parents", "groups", "chunks", "rank"])
def _best_kernel(
    p_q, p_table, p_order, p_kept, p_scores, p_last, p_last_column, p_best,
    first, tokens, members, parents, groups, chunks, rank, rows,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    QUERY_PARTS: tl.constexpr, PARTS: tl.constexpr, PRODUCT: tl.constexpr,
    SLOTS: tl.constexpr, CHUNK: tl.constexpr, LEVEL: tl.constexpr, WIDTH: tl.constexpr,
    RUNS: tl.constexpr, LEVELS: tl.constexpr, RUN: tl.constexpr, GROWTH: tl.constexpr,
    FANOUT: tl.constexpr, EXTRA: tl.constexpr, DENSE: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr, K: tl.constexpr, AFTER: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Ranks `rank` ... rank + K - 1 among a level's members, for each query: entries, -1 for none.

    The last queries come first: they have most candidates.
    """
    i_tile, i_row = (
        tl.num_programs(0) // rows - 1 - tl.program_id(0) // rows,
        tl.program_id(0) % rows,
    )
    i_b, i_h = (i_row // H).to(tl.int64), i_row % H
    start = (first // BLOCK_Q + i_tile) * BLOCK_Q
    o_t, o_d = start + tl.arange(0, BLOCK_Q) - first, tl.arange(0, BLOCK_D)
    m_t = (o_t >= 0) & (o_t < tokens)
    o_row = (i_b * tokens + o_t) * H + i_h
    i_n = i_b * G + i_h // (H // G)
    P = tree_size(start // CHUNK, LEVELS, RUN, WHOLE)
    top = first_level(P, LEVELS, FANOUT, DENSE)
    b_q = finite(load_rows(p_q, o_row, m_t, o_d, D, D).to(tl.float32))
    b_norm = tl.sqrt(tl.sum(b_q * b_q, axis=1))
    q_parts = parts_of(b_q, QUERY_PARTS, PRODUCT)
    scores, columns = (), ()
    for _ in tl.static_range(K):
        scores = scores + (_empty(BLOCK_Q, BLOCK_C, PACKED),)  # noqa: RUF005
        columns = columns + (tl.full((BLOCK_Q,), -1, tl.int32),)  # noqa: RUF005
    last = (scores[0], columns[0])
    if AFTER:
        b_last = tl.load(p_last + o_row, mask=m_t, other=0)
        last = (b_last, tl.load(p_last_column + o_row, mask=m_t, other=-1))
    root, o_in = start * 0, tl.arange(0, BLOCK_C)
    if WIDTH > 0:
        children = tl.where(top > LEVEL, WIDTH * FANOUT, 0)
        root = tl.where(top > LEVEL, P // FANOUT ** (LEVEL + 1) * FANOUT, 0)
        for i_c in range(0, children, BLOCK_C):
            o_c = i_c + o_in
            m_c = m_t[:, None] & (o_c < children)[None, :]
            p_parent = p_kept + o_row[:, None] * WIDTH + (o_c // FANOUT)[None, :]
            m_c &= tl.load(p_parent, mask=m_c, other=-1) >= 0
            p_tile = p_scores + o_row[:, None] * (WIDTH * FANOUT) + o_c[None, :]
            b_score = tl.load(p_tile, mask=m_c, other=float("-inf"))
            scores, columns = _meet(scores, columns, b_score, o_c, last, K, AFTER, PACKED)
    if LEVEL == 0:
        b_stop = (first + o_t) // CHUNK
        stop = (tl.minimum(start + BLOCK_Q, first + tokens) - 1) // CHUNK
    else:
        # Nothing above where the descent starts.
        stop = tl.where(top < LEVEL, 0, P // FANOUT**LEVEL)
        b_stop = o_t * 0 + stop
    for i_c in range(root, stop, BLOCK_C):
        o_c = i_c + o_in
        o_place = i_n * members + o_c
        if LEVEL > 0:
            o_run = run_of(o_c * FANOUT**LEVEL, P, RUNS, RUN, GROWTH)
            o_place = (o_run.to(tl.int64) * groups + i_n) * members + o_c
        b_score = scores_of(
            q_parts, b_norm, p_table, o_place, o_c < stop, o_d, LEVEL, D, EXTRA, QUERY_PARTS,
            PARTS, PRODUCT,
        )  # fmt: skip
        m_c = (o_c[None, :] < b_stop[:, None]) & m_t[:, None]
        b_score = tl.where(m_c, b_score, float("-inf"))
        o_column = WIDTH * FANOUT + o_c - root
        scores, columns = _meet(scores, columns, b_score, o_column, last, K, AFTER, PACKED)
    for i in tl.static_range(K):
        b_entry = entry_of(
            columns[i], p_order, p_kept, o_row, m_t, i_n, root, P, members, parents, groups,
            chunks, LEVEL, WIDTH, RUNS, RUN, GROWTH, FANOUT,
        )  # fmt: skip
        m_out = m_t & (o_row * 0 + rank + i < SLOTS)
        tl.store(p_best + o_row * SLOTS + rank + i, b_entry, mask=m_out)
    if K < SLOTS:
        tl.store(p_last + o_row, scores[K - 1], mask=m_t)
        tl.store(p_last_column + o_row, columns[K - 1], mask=m_t)


def best_members(
    q: Tensor,
    table: Tensor,
    forest: list[Tensor],
    level: int,
    kept: Tensor | None,
    scores: Tensor | None,
    first: int,
    chunk_size: int,
    topk: int,
) -> Tensor:
    """The best members of a level among those that a query visits: [B, T, H, width] int32.

    Args:
        q: [B, T, H, D], contiguous, at positions first ... first + T - 1.
        table: means [B, G, C, D] for level 0, nodes [S, N, M, D + EXTRA] above; float32,
            contiguous.
        forest: of the means (forest.py); [] if every chunk is scored.
        kept: [B, T, H, W] int32 entries of the level above; None at the highest.
        scores: [B, T, H, W · FANOUT] float32 of their children.

    Returns:
        The best first: chunk numbers, or entries; -1 where there are fewer.
    """
    batch, tokens, heads, dim = q.shape
    slots = common.kept_at(level, topk)
    best = torch.empty((batch, tokens, heads, slots), dtype=torch.int32, device=q.device)
    if best.numel() == 0:
        return best
    groups, chunks = (table.shape[1], table.shape[2]) if not level else (0, 0)
    if forest:
        groups, chunks = forest[0].shape[1] // batch, forest[0].shape[2]
    passes = ceil_div(slots, MOST_KEPT)
    keep = ceil_div(slots, passes)
    options = options_for(TABLE, "level" if forest else "flat", q.dtype, dim, q.device)
    tiles = (first + tokens - 1) // options.rows - first // options.rows + 1
    last = last_column = None
    packed = q.dtype != torch.float32
    if passes > 1:
        last = torch.empty(
            q.shape[:3], dtype=torch.int32 if packed else torch.float32, device=q.device
        )
        last_column = torch.empty_like(last, dtype=torch.int32)
    for rank in range(0, slots, keep):
        _best_kernel[(tiles * batch * heads,)](
            q, table, forest[0] if forest else None, kept, scores, last, last_column, best, first,
            tokens, table.shape[2], forest[level + 1].shape[2] if kept is not None else 1,
            batch * groups, chunks, rank, batch * heads,
            H=heads, G=groups, SLOTS=slots, CHUNK=chunk_size, LEVEL=level,
            WIDTH=0 if kept is None else kept.shape[3], **tree_constants(forest, topk),
            **score_constants(q), BLOCK_Q=options.rows, BLOCK_C=options.columns, K=keep,
            AFTER=rank > 0, PACKED=packed, **options.launch,
        )  # fmt: skip
    return best
