# mypy: allow-untyped-defs, allow-incomplete-defs
"""The best of many candidates: chunk means, or nodes of a tree, streamed past a tile of queries.

Flat selection is this once, with all past chunks for candidates. Coarse-to-fine selection
(triton_descent.py) does it level by level: candidates are the children of the nodes that a query
kept, whose scores it reads, and then the members of the level that have no parent.

Axes: B batch, T queries, H query heads, G key/value heads, C chunks, D head size, S lengths of
runs, N = B·G, M nodes of a level. Names: i_ index, p_ pointer, b_ tile in registers, o_ offset, m_
mask. A program has `BLOCK_Q` queries of one head. P is the number of chunks in a query's tree; the
entry of a member of level 1 or higher is run · M + member (forest.py), that of a chunk its number.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvx_kernels.chunk_select import common
from rwkvx_kernels.chunk_select import forest as forests
from rwkvx_kernels.tools.triton_tiles import precision

# Sorts below every chunk.
LOWEST = -0x7FFFFFFFFFFFFFFF


def score_columns(dim: int) -> int:
    """Columns that a product takes at a time: large heads take several."""
    return 32 if dim > 64 else max(16, triton.next_power_of_2(dim))


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


@triton.jit
def pack(b_score, o_member, m_valid, LOWEST: tl.constexpr):
    """Score above, member below, in one integer that sorts by score and then by lower member."""
    b_bits = b_score.to(tl.int32, bitcast=True)
    b_key = b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)
    b_low = (0x7FFFFFFF - o_member).to(tl.int64)
    b_packed = (b_key.to(tl.int64) << 32) | b_low[None, :]
    return tl.where(m_valid, b_packed, LOWEST)


@triton.jit
def unpack(b_packed, LOWEST: tl.constexpr):
    """The members of packed scores; -1 for none."""
    b_member = (0x7FFFFFFF - (b_packed & 0x7FFFFFFF)).to(tl.int32)
    return tl.where(b_packed == LOWEST, -1, b_member)


@triton.jit
def keep_best(b_best, b_packed, K: tl.constexpr):
    """The best K of rows of candidates and of the best so far, which are in rising order.

    Of two sorted rows, one rising and one falling, the pairwise maximum has the best K.
    """
    return tl.bitonic_merge(tl.maximum(b_best, tl.topk(b_packed, K)), descending=False)


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
def scores_of(
    p_q, m_q, p_x, m_x,
    LEVEL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of rows with chunk means, or with nodes (`common.node_queries`).

    `BLOCK_D` columns at a time: exact products of float32 fill the registers with more.
    """
    b_score = tl.zeros((p_q.shape[0], p_x.shape[0]), tl.float32)
    b_square = tl.zeros((p_q.shape[0],), tl.float32)
    for i_d in range(0, D, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)
        m_row = m_q[:, None] & (o_d < D)[None, :]
        b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_row, other=0.0).to(tl.float32)
        m_column = m_x[None, :] & (o_d < D)[:, None]
        b_x = tl.load(p_x[None, :] + o_d[:, None], mask=m_column, other=0.0)
        b_score = tl.dot(b_q, b_x, b_score, input_precision=PRECISION)
        b_square += tl.sum(b_q * b_q, axis=1)
    if LEVEL > 0:
        b_radius = tl.load(p_x + D, mask=m_x, other=0.0)
        b_score += tl.sqrt(b_square)[:, None] * b_radius[None, :]
    return b_score


@triton.jit(do_not_specialize=["first", "tokens", "members", "parents", "groups", "chunks"])
def _best_kernel(
    p_q, p_table, p_order, p_kept, p_scores, p_best,
    first, tokens, members, parents, groups, chunks,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    SLOTS: tl.constexpr, CHUNK: tl.constexpr, LEVEL: tl.constexpr, WIDTH: tl.constexpr,
    RUNS: tl.constexpr, LEVELS: tl.constexpr, RUN: tl.constexpr, GROWTH: tl.constexpr,
    FANOUT: tl.constexpr, EXTRA: tl.constexpr, DENSE: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr, K: tl.constexpr,
    PRECISION: tl.constexpr, LOWEST: tl.constexpr,
):  # fmt: skip  # fmt: skip  # fmt: skip
    """The best `SLOTS` members of a level for each query: their entries, -1 for none."""
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    start = (first // BLOCK_Q + tl.program_id(0)) * BLOCK_Q
    o_t = start + tl.arange(0, BLOCK_Q) - first
    o_k = tl.arange(0, K)
    m_t = (o_t >= 0) & (o_t < tokens)
    o_row = (i_b * tokens + o_t) * H + i_h
    i_n = i_b * G + i_h // (H // G)
    P = tree_size(start // CHUNK, LEVELS, RUN, WHOLE)
    top = first_level(P, LEVELS, FANOUT, DENSE)
    b_best = tl.full((BLOCK_Q, K), LOWEST, tl.int64)
    root = start * 0
    if WIDTH > 0:
        children = tl.where(top > LEVEL, WIDTH * FANOUT, 0)
        root = tl.where(top > LEVEL, P // FANOUT ** (LEVEL + 1) * FANOUT, 0)
        for i_c in range(0, children, BLOCK_C):
            o_c = i_c + tl.arange(0, BLOCK_C)
            m_c = m_t[:, None] & (o_c < children)[None, :]
            p_parent = p_kept + o_row[:, None] * WIDTH + (o_c // FANOUT)[None, :]
            m_c &= tl.load(p_parent, mask=m_c, other=-1) >= 0
            p_tile = p_scores + o_row[:, None] * (WIDTH * FANOUT) + o_c[None, :]
            b_score = tl.load(p_tile, mask=m_c, other=0.0)
            b_best = keep_best(b_best, pack(b_score, o_c, m_c, LOWEST), K)
    if LEVEL == 0:
        b_stop = (first + o_t) // CHUNK
        stop = (tl.minimum(start + BLOCK_Q, first + tokens) - 1) // CHUNK
    else:
        # Nothing above where the descent starts.
        stop = tl.where(top < LEVEL, 0, P // FANOUT**LEVEL)
        b_stop = o_t * 0 + stop
    for i_c in range(root, stop, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        p_x = p_table + (i_n * members + o_c) * D
        if LEVEL > 0:
            o_run = run_of(o_c * FANOUT**LEVEL, P, RUNS, RUN, GROWTH)
            o_place = (o_run.to(tl.int64) * groups + i_n) * members + o_c
            p_x = p_table + o_place * (D + EXTRA)
        b_score = scores_of(p_q + o_row * D, m_t, p_x, o_c < stop, LEVEL, D, BLOCK_D, PRECISION)
        m_c = o_c[None, :] < b_stop[:, None]
        b_packed = pack(b_score, WIDTH * FANOUT + o_c - root, m_c, LOWEST)
        b_best = keep_best(b_best, b_packed, K)
    b_column = unpack(b_best, LOWEST)
    o_member = b_column - WIDTH * FANOUT + root
    b_entry = o_member
    if LEVEL > 0:
        b_entry += run_of(o_member * FANOUT**LEVEL, P, RUNS, RUN, GROWTH) * members
    if WIDTH > 0:
        m_child = (b_column >= 0) & (b_column < WIDTH * FANOUT)
        p_parent = p_kept + o_row[:, None] * WIDTH + b_column // FANOUT
        b_parent = tl.load(p_parent, mask=m_child & m_t[:, None], other=0)
        o_run, o_in = b_parent // parents, b_parent % parents * FANOUT + b_column % FANOUT
        if LEVEL > 0:
            b_child = o_run * members + o_in
        else:
            o_place = (o_run.to(tl.int64) * groups + i_n) * chunks + o_in
            b_child = tl.load(p_order + o_place, mask=m_child & m_t[:, None], other=0)
        b_entry = tl.where(m_child, b_child, b_entry)
    b_entry = tl.where(b_column >= 0, b_entry, -1)
    # The best come last.
    p_out = p_best + o_row[:, None] * SLOTS + (K - 1 - o_k)[None, :]
    tl.store(p_out, b_entry, mask=m_t[:, None] & (K - 1 - o_k < SLOTS)[None, :])


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
    keep = max(2, triton.next_power_of_2(slots))
    block_q = 32 if keep <= 16 else 16
    groups, chunks = (table.shape[1], table.shape[2]) if not level else (0, 0)
    if forest:
        groups, chunks = forest[0].shape[1] // batch, forest[0].shape[2]
    # What keeps the registers from spilling, by Triton 3.6 and 3.9 (docs/results/ahead_of_time.md).
    nodes = level > 0 and keep <= 64
    stages = 1 if keep > 64 else 3 if nodes or not forest else 2
    warps = 8 if kept is not None or (dim > 64 and not nodes) else 4
    tiles = (first + tokens - 1) // block_q - first // block_q + 1
    _best_kernel[(tiles, batch * heads)](
        q, table, forest[0] if forest else None, kept, scores, best, first, tokens, table.shape[2],
        forest[level + 1].shape[2] if kept is not None else 1, batch * groups, chunks,
        H=heads, G=groups, D=dim, SLOTS=slots, CHUNK=chunk_size, LEVEL=level,
        WIDTH=0 if kept is None else kept.shape[3], **tree_constants(forest, topk),
        BLOCK_D=score_columns(dim), BLOCK_Q=block_q, BLOCK_C=max(64, keep), K=keep,
        PRECISION=precision(torch.float32, q.device), LOWEST=LOWEST,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return best
