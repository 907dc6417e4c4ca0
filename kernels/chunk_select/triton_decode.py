# mypy: allow-untyped-defs, allow-incomplete-defs
"""Selection for one or a few new tokens behind long caches of unequal length: split over chunks.

Axes: B sequences, T queries, H query heads, G key/value heads, C chunks, D head size; a row is one
head of one query. Names: i_ index, p_ pointer, b_ tile in registers, o_ offset, m_ mask.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvx_kernels.chunk_select import common
from rwkvx_kernels.chunk_select.triton_best import (
    first_level,
    run_of,
    sortable,
    tree_constants,
    tree_size,
)
from rwkvx_kernels.tools.sizes import ceil_div, next_power_of_2

# Candidates that one program scores at most, and into how many splits fewer are cut: each takes
# time, and whoever joins splits reads what all of them kept.
MOST_SPLIT, SPLITS = 512, 8
LEAST_BLOCK = 64
# Sorts below every chunk.
LOWEST = -0x7FFFFFFFFFFFFFFF


@triton.jit
def pack(b_score, o_member, m_valid, LOWEST: tl.constexpr):
    """Score above, member below, in one integer that sorts by score and then by lower member."""
    b_key = sortable(b_score)
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
def best_of(p_best, candidates, K: tl.constexpr, BLOCK_C: tl.constexpr, LOWEST: tl.constexpr):
    """The best K of what splits kept for a row, [1, K], the best last; -1 for none."""
    b_best = tl.full((1, K), LOWEST, tl.int64)
    for i_c in range(0, candidates, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        b_packed = tl.load(p_best + o_c, mask=o_c < candidates, other=LOWEST)[None, :]
        b_best = keep_best(b_best, b_packed, K)
    return unpack(b_best, LOWEST)


@triton.jit
def score_split(
    i_row, i_n, i_split, past, p_q, p_table, p_order, p_above, p_best,
    above, members, parents, groups, chunks, splits,
    D: tl.constexpr, LEVEL: tl.constexpr, WIDTH: tl.constexpr, KEPT: tl.constexpr,
    RUNS: tl.constexpr, LEVELS: tl.constexpr, RUN: tl.constexpr, GROWTH: tl.constexpr,
    FANOUT: tl.constexpr, EXTRA: tl.constexpr, DENSE: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, SPLIT: tl.constexpr, K: tl.constexpr,
    LOWEST: tl.constexpr,
):  # fmt: skip
    """The best K candidates of one split for a row behind `past` chunks, packed with their scores.

    The candidates of a row are the children of the WIDTH entries it kept of the level above, then
    members without parent. `above` entries, KEPT of each split, were written there.
    """
    P = tree_size(past, LEVELS, RUN, WHOLE)
    top = first_level(P, LEVELS, FANOUT, DENSE)
    root = tl.where(top > LEVEL, P // FANOUT ** (LEVEL + 1) * FANOUT, 0)
    stop = past
    if LEVEL > 0:
        stop = tl.where(top < LEVEL, 0, P // FANOUT**LEVEL)
    children = tl.where(top > LEVEL, WIDTH * FANOUT, 0)
    candidates = children + stop - root
    o_d = tl.arange(0, BLOCK_D)
    b_q = tl.load(p_q + i_row * D + o_d, mask=o_d < D, other=0.0).to(tl.float32)[None, :]
    if WIDTH > 0:
        b_kept = tl.reshape(best_of(p_above + i_row * above, above, KEPT, KEPT, LOWEST), (KEPT,))
    b_best = tl.full((1, K), LOWEST, tl.int64)
    begin = i_split * SPLIT
    for i_c in range(begin, tl.minimum(begin + SPLIT, candidates), BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        m_c = o_c < candidates
        o_member = o_c - children + root
        o_run = run_of(o_member * FANOUT**LEVEL, P, RUNS, RUN, GROWTH)
        if WIDTH > 0:
            m_child = o_c < children
            o_kept = tl.where(m_child, KEPT - 1 - o_c // FANOUT, 0).to(tl.int32)
            b_parent = tl.where(m_child, tl.gather(b_kept, o_kept, 0), 0)
            m_c &= b_parent >= 0
            o_run = tl.where(m_child, b_parent // parents, o_run)
            o_member = tl.where(
                m_child, b_parent % parents * FANOUT + (o_c % FANOUT).to(tl.int32), o_member
            )
        o_place = (o_run.to(tl.int64) * groups + i_n) * members + o_member
        o_entry = o_run * members + o_member
        if LEVEL == 0:
            o_entry = o_member
            if WIDTH > 0:
                p_chunk = p_order + (o_run.to(tl.int64) * groups + i_n) * chunks + o_member
                b_chunk = tl.load(p_chunk, mask=m_c & m_child, other=0)
                o_entry = tl.where(m_child, b_chunk, o_member)
            o_place = i_n * members + o_entry
        p_x = p_table + o_place * (D if LEVEL == 0 else D + EXTRA)
        m_x = m_c[:, None] & (o_d < D)[None, :]
        b_x = tl.load(p_x[:, None] + o_d[None, :], mask=m_x, other=0.0)
        b_score = tl.sum(b_x * b_q, axis=1)[None, :]
        if LEVEL > 0:
            b_radius = tl.load(p_x + D, mask=m_c, other=0.0)
            b_score += tl.sqrt(tl.sum(b_q * b_q, axis=1))[:, None] * b_radius[None, :]
        b_packed = pack(b_score, o_entry.to(tl.int32), m_c[None, :], LOWEST)
        b_best = keep_best(b_best, b_packed, K)
    o_best = (i_row * splits + i_split) * K + tl.arange(0, K)
    tl.store(p_best + o_best[None, :], b_best)


@triton.jit(
    do_not_specialize=[
        *("tokens", "ahead", "above", "members", "parents", "groups", "chunks", "splits")
    ]
)
def _score_kernel(
    p_q, p_table, p_order, p_above, p_lengths, p_best,
    tokens, ahead, above, members, parents, groups, chunks, splits,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    CHUNK: tl.constexpr, LEVEL: tl.constexpr, WIDTH: tl.constexpr, KEPT: tl.constexpr,
    RUNS: tl.constexpr, LEVELS: tl.constexpr, RUN: tl.constexpr, GROWTH: tl.constexpr,
    FANOUT: tl.constexpr, EXTRA: tl.constexpr, DENSE: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, SPLIT: tl.constexpr, K: tl.constexpr,
    LOWEST: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    i_b, i_t, i_h = i_row // H // tokens, i_row // H % tokens, i_row % H
    past = (tl.load(p_lengths + i_b) + ahead + i_t) // CHUNK
    score_split(
        i_row, i_b * G + i_h // (H // G), tl.program_id(1), past, p_q, p_table, p_order, p_above,
        p_best, above, members, parents, groups, chunks, splits, D, LEVEL, WIDTH, KEPT, RUNS,
        LEVELS, RUN, GROWTH, FANOUT, EXTRA, DENSE, WHOLE, BLOCK_D, BLOCK_C, SPLIT, K, LOWEST,
    )  # fmt: skip


@triton.jit(do_not_specialize=["candidates"])
def _merge_kernel(
    p_best,
    p_entries,
    candidates,
    SLOTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    K: tl.constexpr,
    LOWEST: tl.constexpr,
):
    """The best of all splits of a row, unpacked."""
    i_row = tl.program_id(0).to(tl.int64)
    b_best = best_of(p_best + i_row * candidates, candidates, K, BLOCK_C, LOWEST)
    o_k = K - 1 - tl.arange(0, K)  # the best come last
    p_out = (p_entries + i_row * SLOTS + o_k)[None, :]
    tl.store(p_out, b_best, mask=(o_k < SLOTS)[None, :])


def _most_candidates(members: int, forest: list[Tensor], level: int, topk: int) -> int:
    """How many candidates a row can have at a level of so many members."""
    if not forest or level == common.first_level(forest[0].shape[2]):
        return members
    if level == 0:  # the tail beside the children, or all of few chunks
        return common.scored_whole(topk) + common.RUN
    return max(common.DENSE_NODES, common.FANOUT * (common.beam_widths(topk)[1] + 1))


def kept_of_split(slots: int) -> int:
    """How many candidates a split keeps, where so many of all are wanted."""
    return max(2, next_power_of_2(slots))


def splits_of(
    members: int, forest: list[Tensor], level: int, topk: int, dim: int
) -> tuple[int, int, dict[str, int]]:
    """How a row's candidates at a level of so many members are cut: how many splits; how many
    candidates each keeps; compile-time constants of `score_split` beside those of the trees."""
    candidates = _most_candidates(members, forest, level, topk)
    keep = kept_of_split(common.kept_at(level, topk))
    block = max(keep, LEAST_BLOCK if dim <= 64 else LEAST_BLOCK // 2)
    split = next_power_of_2(ceil_div(candidates, SPLITS))
    split = max(block, min(MOST_SPLIT, split))
    sizes = {"BLOCK_C": block, "SPLIT": split, "K": keep, "LOWEST": LOWEST}
    return ceil_div(candidates, split), keep, sizes


def best_of_level(
    q: Tensor,
    means: Tensor,
    forest: list[Tensor],
    level: int,
    above: Tensor | None,
    lengths: Tensor,
    chunk_size: int,
    topk: int,
    counted: bool,
) -> Tensor:
    """Launch: what each split of a level's candidates keeps, packed: [B·T·H, splits · K] int64.

    above: the same of the level above; None at the highest. The rest as for `select_rows`.
    """
    batch, tokens, heads, dim = q.shape
    groups, rows = means.shape[1], batch * tokens * heads
    table = forest[level] if level else means
    splits, keep, sizes = splits_of(table.shape[2], forest, level, topk, dim)
    best = torch.empty((rows, splits * keep), dtype=torch.int64, device=q.device)
    width = 0 if above is None else common.kept_at(level + 1, topk)
    _score_kernel[(rows, splits)](
        q, table, forest[0] if forest else None, above, lengths, best, tokens,
        -tokens if counted else 0, 0 if above is None else above.shape[1], table.shape[2],
        1 if above is None else forest[level + 1].shape[2], batch * groups, means.shape[2], splits,
        H=heads, G=groups, D=dim, CHUNK=chunk_size, LEVEL=level,
        BLOCK_D=max(16, next_power_of_2(dim)), WIDTH=width, KEPT=kept_of_split(width),
        **tree_constants(forest, topk), **sizes,
        num_warps=4 if keep <= 64 else 8,
    )  # fmt: skip
    return best


def descend_rows(
    q: Tensor,
    means: Tensor,
    forest: list[Tensor],
    lengths: Tensor,
    chunk_size: int,
    topk: int,
    counted: bool = True,
    above: Tensor | None = None,
) -> Tensor:
    """As `select_rows`, with the best of the splits not joined: [B·T·H, splits · K] int64, packed.

    above: of the highest level, where that was scored by somebody else.
    """
    top = common.first_level(means.shape[2]) if forest else 0
    for level in range(top if above is None else top - 1, -1, -1):
        above = best_of_level(q, means, forest, level, above, lengths, chunk_size, topk, counted)
    assert above is not None
    return above


def select_rows(
    q: Tensor,
    means: Tensor,
    forest: list[Tensor],
    lengths: Tensor,
    chunk_size: int,
    topk: int,
    counted: bool = True,
) -> Tensor:
    """The chosen chunks of the last T tokens of each sequence, by row: [B·T·H, topk - 1] int32.

    A launch for each level, and one.

    Args:
        q: [B, T, H, D], contiguous. means: [B, G, C, D] float32, contiguous, of every completed
            chunk. lengths: [B] int64, tokens of each sequence; the T new ones included where
            `counted`.
        forest: tensors of the forest over them, with room for C chunks; [] for flat selection.
    """
    best = descend_rows(q, means, forest, lengths, chunk_size, topk, counted)
    keep = kept_of_split(topk - 1)
    entries = torch.empty((len(best), topk - 1), dtype=torch.int32, device=q.device)
    _merge_kernel[(len(best),)](
        best, entries, best.shape[1], SLOTS=topk - 1, BLOCK_C=max(LEAST_BLOCK, keep), K=keep,
        LOWEST=LOWEST,
    )  # fmt: skip
    return entries
