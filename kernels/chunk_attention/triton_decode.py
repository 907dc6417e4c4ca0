# mypy: allow-untyped-defs, allow-incomplete-defs
"""One or a few new tokens against long caches of unequal length: the work is split over chunks.

Axes: B sequences, T queries, H query heads, G key/value heads, C chunks, D head size; a row is one
head of one query. Names: i_ index, p_ pointer, b_ block, o_ offset, m_ mask.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvx_kernels.chunk_attention import tree
from rwkvx_kernels.chunk_attention.triton_select import (
    LOWEST,
    first_level,
    keep_best,
    pack,
    run_of,
    tree_constants,
    tree_size,
    unpack,
)

# Chunks that one program scores; a cache of a million tokens in chunks of 128 makes 16 programs.
SPLIT = 512
LEAST_BLOCK = 64


@triton.jit(do_not_specialize=["tokens", "members", "parents", "groups", "chunks", "splits"])
def _score_kernel(
    p_q, p_table, p_order, p_kept, p_lengths, p_best,
    tokens, members, parents, groups, chunks, splits,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    CHUNK: tl.constexpr, LEVEL: tl.constexpr, WIDTH: tl.constexpr,
    RUNS: tl.constexpr, LEVELS: tl.constexpr, RUN: tl.constexpr, GROWTH: tl.constexpr,
    FANOUT: tl.constexpr, EXTRA: tl.constexpr, DENSE: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, SPLIT: tl.constexpr, K: tl.constexpr,
    LOWEST: tl.constexpr,
):  # fmt: skip
    """The best K candidates of one split for one row, packed with their scores.

    The candidates of a row are the children of the entries it kept, then members without parent.
    """
    i_row, i_split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_b, i_t, i_h = i_row // H // tokens, i_row // H % tokens, i_row % H
    i_n = i_b * G + i_h // (H // G)
    past = (tl.load(p_lengths + i_b) - tokens + i_t) // CHUNK
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
    b_best = tl.full((1, K), LOWEST, tl.int64)
    begin = i_split * SPLIT
    for i_c in range(begin, tl.minimum(begin + SPLIT, candidates), BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        m_c = o_c < candidates
        o_member = o_c - children + root
        o_run = run_of(o_member * FANOUT**LEVEL, P, RUNS, RUN, GROWTH)
        if WIDTH > 0:
            m_child = o_c < children
            b_parent = tl.load(p_kept + i_row * WIDTH + o_c // FANOUT, mask=m_child, other=0)
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
    b_best = tl.full((1, K), LOWEST, tl.int64)
    for i_c in range(0, candidates, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        p_tile = p_best + i_row * candidates + o_c
        b_packed = tl.load(p_tile, mask=o_c < candidates, other=LOWEST)[None, :]
        b_best = keep_best(b_best, b_packed, K)
    o_k = K - 1 - tl.arange(0, K)  # the best come last
    p_out = (p_entries + i_row * SLOTS + o_k)[None, :]
    tl.store(p_out, unpack(b_best, LOWEST), mask=(o_k < SLOTS)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _part_kernel(
    p_q,
    p_k,
    p_v,
    p_lengths,
    p_chosen,
    p_part,
    p_lse,
    stride_b,
    stride_s,
    stride_g,
    scale,
    tokens,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk of one row, the own chunk in the last slot: output and binary log-sum-exp."""
    i_row, i_slot = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_b, i_t, i_h = i_row // H // tokens, i_row // H % tokens, i_row % H
    position = tl.load(p_lengths + i_b) - tokens + i_t
    i_chunk = position // CHUNK
    # Without slots there is no list: a load from it would not compile.
    if SLOTS > 0:  # noqa: SIM102
        if i_slot < SLOTS:
            i_chunk = tl.load(p_chosen + i_row * SLOTS + i_slot).to(tl.int64)
    o_part = i_row * (SLOTS + 1) + i_slot
    if i_chunk < 0:
        tl.store(p_lse + o_part, float("-inf"))
        return
    o_d = tl.arange(0, BLOCK_D)
    b_q = tl.load(p_q + i_row * D + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    shift = i_b * stride_b + (i_h // (H // G)) * stride_g
    b_top = tl.full((1,), float("-inf"), tl.float32)
    b_sum = tl.zeros((1,), tl.float32)
    b_acc = tl.zeros((BLOCK_D,), tl.float32)
    stop = tl.minimum((i_chunk + 1) * CHUNK, position + 1)
    for i_s in range(i_chunk * CHUNK, stop, BLOCK):
        o_s = i_s + tl.arange(0, BLOCK)
        m_x = (o_s < stop)[:, None] & (o_d < D)[None, :]
        o_x = shift + o_s[:, None] * stride_s + o_d[None, :]
        b_k = tl.load(p_k + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_v = tl.load(p_v + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_score = tl.where(o_s < stop, tl.sum(b_k * b_q[None, :], axis=1) * scale, float("-inf"))
        b_new = tl.maximum(b_top, tl.max(b_score, axis=0))
        b_weight, b_shrink = tl.exp2(b_score - b_new), tl.exp2(b_top - b_new)
        b_sum = b_sum * b_shrink + tl.sum(b_weight, axis=0)
        b_acc = b_acc * b_shrink + tl.sum(b_v * b_weight[:, None], axis=0)
        b_top = b_new
    tl.store(p_part + o_part * D + o_d, b_acc / b_sum, mask=o_d < D)
    tl.store(p_lse + o_part + tl.arange(0, 1), b_top + tl.log2(b_sum))


@triton.jit
def _join_kernel(
    p_part,
    p_lse,
    p_o,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One softmax over the parts of a row."""
    i_row = tl.program_id(0).to(tl.int64)
    o_p, o_d = i_row * PARTS + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D)
    m_p = tl.arange(0, BLOCK_P) < PARTS
    b_lse = tl.load(p_lse + o_p, mask=m_p, other=float("-inf"))
    m_p = b_lse > float("-inf")
    b_weight = tl.exp2(b_lse - tl.max(b_lse, axis=0))
    m_x = m_p[:, None] & (o_d < D)[None, :]
    b_part = tl.load(p_part + o_p[:, None] * D + o_d[None, :], mask=m_x, other=0.0)
    b_o = tl.sum(b_part * b_weight[:, None], axis=0) / tl.sum(b_weight, axis=0)
    tl.store(p_o + i_row * D + o_d, b_o.to(p_o.dtype.element_ty), mask=o_d < D)


def _most_candidates(members: int, forest: list[Tensor], level: int, topk: int) -> int:
    """How many candidates a row can have at a level of so many members."""
    if not forest or level == tree.first_level(forest[0].shape[2]):
        return members
    if level == 0:  # the tail beside the children, or all of few chunks
        return tree.scored_whole(topk) + tree.RUN
    return max(tree.DENSE_NODES, tree.FANOUT * (tree.beam_widths(topk)[1] + 1))


def _best(
    q: Tensor,
    table: Tensor,
    forest: list[Tensor],
    level: int,
    kept: Tensor | None,
    lengths: Tensor,
    sizes: dict[str, int],
    topk: int,
) -> Tensor:
    """As `triton_select.best_members`, by row: [B·T·H, width]."""
    batch, tokens, heads, dim = q.shape
    rows, members = batch * tokens * heads, table.shape[2]
    slots = tree.beam_widths(topk)[level > 1] if level else topk - 1
    keep = max(2, triton.next_power_of_2(slots))
    splits = triton.cdiv(_most_candidates(members, forest, level, topk), SPLIT)
    best = torch.empty((rows, splits * keep), dtype=torch.int64, device=q.device)
    _score_kernel[(rows, splits)](
        q,
        table,
        forest[0] if forest else None,
        kept,
        lengths,
        best,
        tokens,
        members,
        forest[level + 1].shape[2] if kept is not None else 1,
        batch * sizes["G"],
        forest[0].shape[2] if forest else 1,
        splits,
        **sizes,
        **tree_constants(forest, topk),
        LEVEL=level,
        WIDTH=0 if kept is None else kept.shape[1],
        BLOCK_C=max(keep, LEAST_BLOCK if dim <= 64 else LEAST_BLOCK // 2),
        SPLIT=SPLIT,
        K=keep,
        LOWEST=LOWEST,
        num_warps=4 if keep <= 64 else 8,
    )
    entries = torch.empty((rows, slots), dtype=torch.int32, device=q.device)
    block = max(LEAST_BLOCK, keep)
    _merge_kernel[(rows,)](
        best, entries, splits * keep, SLOTS=slots, BLOCK_C=block, K=keep, LOWEST=LOWEST
    )
    return entries


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    means: Tensor,
    forest: list[Tensor],
    lengths: Tensor,
    chunk_size: int,
    topk: int,
) -> Tensor:
    """o [B, T, H, D] of the last T tokens of each sequence; no gradient.

    Args:
        q: [B, T, H, D], contiguous. k, v: [B, G, S, D] with room for S tokens.
        means: [B, G, C, D] float32, contiguous, of every completed chunk.
        forest: tensors of the forest over them, with room for C chunks; [] for flat selection.
        lengths: [B] int64, tokens of each sequence, the T new ones included.
    """
    batch, tokens, heads, dim = q.shape
    groups, rows, slots = k.shape[1], batch * tokens * heads, topk - 1
    sizes = {"H": heads, "G": groups, "D": dim, "CHUNK": chunk_size}
    sizes["BLOCK_D"] = max(16, triton.next_power_of_2(dim))
    chosen = None
    if slots:
        top = tree.first_level(means.shape[2]) if forest else 0
        for level in range(top, -1, -1):
            table = forest[level] if level else means
            chosen = _best(q, table, forest, level, chosen, lengths, sizes, topk)
    part = torch.empty((rows, topk, dim), dtype=torch.float32, device=q.device)
    lse = torch.empty((rows, topk), dtype=torch.float32, device=q.device)
    _part_kernel[(rows, topk)](
        q,
        k,
        v,
        lengths,
        chosen,
        part,
        lse,
        k.stride(0),
        k.stride(2),
        k.stride(1),
        1.4426950408889634 * dim**-0.5,
        tokens,
        **sizes,
        SLOTS=slots,
        BLOCK=min(64, triton.next_power_of_2(chunk_size)),
        num_warps=4,
    )
    o = torch.empty_like(q)
    block_p = triton.next_power_of_2(topk)
    block_d = sizes["BLOCK_D"]
    _join_kernel[(rows,)](part, lse, o, D=dim, PARTS=topk, BLOCK_D=block_d, BLOCK_P=block_p)
    return o
