# mypy: allow-untyped-defs, allow-incomplete-defs
"""Keys and values of one token go to their places, while past chunks are scored: one launch.

Who selects reads completed chunks before the token's own, so that neither waits for the other.
Axes: B rows of the batch, H query heads, G key/value heads, D head size, W taps of the convolution
over keys. Names as in `triton_products.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvx_kernels.chunk_attention.triton_append import put
from rwkvx_kernels.chunk_select import common
from rwkvx_kernels.chunk_select.triton_best import tree_constants
from rwkvx_kernels.chunk_select.triton_decode import score_split, splits_of
from rwkvx_kernels.one_token.common import BlockWeights, Cache
from rwkvx_kernels.tools.sizes import next_power_of_2
from rwkvx_kernels.tools.triton_overlap import overlapping, wait_for_launches
from rwkvx_kernels.tools.triton_tiles import load, store


@triton.jit
def convolved(
    b_k, p_conv, p_taps, i_b, i_g, G: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """A key after the causal convolution over those before it, which move up."""
    o_d, o_w = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_W)[:, None]
    o_c, m_d = i_g * D + o_d, o_d < D
    m_old = (o_w < W - 1) & m_d
    o_old = (i_b * (W - 1) + o_w) * (G * D) + o_c
    b_old = load(p_conv, o_old, m_old)
    b_next = load(p_conv, o_old + G * D, (o_w < W - 2) & m_d)
    b_tap = load(p_taps, o_w * (G * D) + o_c, m_old)
    b_last = tl.sum(load(p_taps, (W - 1) * (G * D) + o_c, m_d), axis=0)
    tl.debug_barrier()  # all have read what is overwritten
    store(p_conv, o_old, tl.where(o_w == W - 2, b_k[None, :], b_next), m_old)
    b_k = b_k * b_last + tl.sum(b_old * b_tap, axis=0)
    return b_k


@triton.jit(do_not_specialize=["groups", "rows", "capacity", "chunks", "members", "splits"])
def _place_kernel(
    p_q, p_new_k, p_new_v, p_conv, p_taps, p_k, p_v, p_means, p_table, p_lengths, p_best,
    groups, rows, capacity, chunks, members, splits,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, W: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr, TILE: tl.constexpr, LEVEL: tl.constexpr,
    RUNS: tl.constexpr, LEVELS: tl.constexpr, RUN: tl.constexpr, GROWTH: tl.constexpr,
    FANOUT: tl.constexpr, EXTRA: tl.constexpr, DENSE: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_C: tl.constexpr, SPLIT: tl.constexpr, K: tl.constexpr, LOWEST: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """The first B · G programs have a key and a value each, the others a split of what a row
    scores first: its past chunks, or the highest level of its tree."""
    wait_for_launches(OVERLAP)
    i_program = tl.program_id(0).to(tl.int64)
    if i_program < groups:
        i_b, i_g = i_program // G, i_program % G
        o_d = tl.arange(0, BLOCK_D)
        b_k = load(p_new_k, i_program * D + o_d, o_d < D)
        b_v = load(p_new_v, i_program * D + o_d, o_d < D)
        if p_conv is not None:
            b_k = convolved(b_k, p_conv, p_taps, i_b, i_g, G, D, W, BLOCK_D, BLOCK_W)
        kind = p_k.dtype.element_ty
        put(
            b_k.to(kind), b_v.to(kind), i_program, tl.load(p_lengths + i_b), p_k, p_v, p_means,
            capacity, chunks, D, CHUNK, BLOCK_D, TILE,
        )  # fmt: skip
    elif K > 0:
        i_row, i_split = (i_program - groups) % rows, (i_program - groups) // rows
        i_b, i_h = i_row // H, i_row % H
        past = tl.load(p_lengths + i_b) // CHUNK
        score_split(
            i_row, i_b * G + i_h // (H // G), i_split, past, p_q, p_table, None, None, p_best, 0,
            members, 1, groups, 1, splits, D, LEVEL, 0, 0, RUNS, LEVELS, RUN, GROWTH, FANOUT,
            EXTRA, DENSE, WHOLE, BLOCK_D, BLOCK_C, SPLIT, K, LOWEST,
        )  # fmt: skip


def place(
    q: Tensor, k: Tensor, v: Tensor, weights: BlockWeights, cache: Cache, slots: int
) -> Tensor | None:
    """Launch: k, v [B, G, D] float32 into the cache, keys after their convolution.

    Args:
        q: [B, H, D] float32. slots: chunks to select; 0 for none.

    Returns:
        What each split of the chunks, or of the nodes of the highest level, kept for each row,
        packed: [B · H, candidates] int64.
    """
    batch, groups, capacity, dim = cache.k.shape
    chunks, rows = cache.means.shape[2], batch * weights.heads
    level = common.first_level(chunks) if cache.forest else 0
    table = cache.forest[level] if level else cache.means
    splits, best = 0, None
    score = {"BLOCK_C": 1, "SPLIT": 1, "K": 0, "LOWEST": 0}
    if slots:
        splits, keep, score = splits_of(table.shape[2], cache.forest, level, slots + 1, dim)
        best = torch.empty((rows, splits * keep), dtype=torch.int64, device=q.device)
    taps = weights.conv[0]
    width = 0 if taps is None else len(taps)
    _place_kernel[(batch * groups + rows * splits,)](
        q, k, v, cache.conv, taps, cache.k, cache.v, cache.means, table, cache.position, best,
        batch * groups, rows, capacity, chunks, table.shape[2], splits,
        H=weights.heads, G=groups, D=dim, W=width, CHUNK=capacity // chunks,
        BLOCK_D=max(16, next_power_of_2(dim)),
        BLOCK_W=max(1, next_power_of_2(width - 1)) if width > 1 else 1,
        TILE=min(64, next_power_of_2(capacity // chunks)),
        LEVEL=level, **tree_constants(cache.forest, slots + 1), **score,
        num_warps=4 if score["K"] <= 64 else 8, **overlapping(q.device),
    )  # fmt: skip
    return best
