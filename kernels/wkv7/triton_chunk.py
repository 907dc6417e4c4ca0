# mypy: allow-untyped-defs, allow-incomplete-defs
"""What all Triton kernels of WKV7 share: a chunk's tokens, its scores and their inverse.

Axes: M chunks, C tokens of a chunk, H heads, K key channels, V value channels. Names: i_ index,
p_ pointer, b_ tile in registers, o_ offset, m_ mask. Symbols as in README.md: g, centre, hats, A,
(I - A)^-1. Dots take float32 and multiply in the precision of the constant PRECISION.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvx_kernels.tools.triton_device import device_kind
from rwkvx_kernels.tools.triton_tiles import dot, load

# Substitution row by row inside blocks of so many tokens; larger ones are merged from them.
INNER: tl.constexpr = tl.constexpr(16)


class Layout(NamedTuple):
    """Where chunks are: sequences of equal length, or packed ones.

    Attributes:
        chunks: programs to launch; with packed sequences an upper bound that needs no look at
            the offsets. sequences: how many. tokens: of each sequence when not packed.
        per_sequence: chunks of each sequence when not packed.
        table: [chunks, 2] int64: first token and number of tokens (0: no chunk), or None.
        bounds: [sequences + 1] int64: first chunk of each sequence, or None.
    """

    chunks: int
    sequences: int
    tokens: int
    per_sequence: int
    table: Tensor | None
    bounds: Tensor | None


def lay_out(batch: int, tokens: int, cu_seqlens: Tensor | None, chunk: int) -> Layout:
    """Cut sequences into chunks, without a transfer from the device."""
    if cu_seqlens is None:
        per_sequence = triton.cdiv(tokens, chunk)
        return Layout(batch * per_sequence, batch, tokens, per_sequence, None, None)
    offsets = cu_seqlens.long()
    sequences = len(offsets) - 1
    counts = (offsets.diff() + chunk - 1) // chunk
    bounds = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    chunks = triton.cdiv(tokens, chunk) + sequences
    index = torch.arange(chunks, device=offsets.device)
    owner = torch.searchsorted(bounds[1:], index, right=True).clamp(max=max(sequences - 1, 0))
    first = offsets[owner] + (index - bounds[owner]) * chunk
    count = (offsets[owner + 1] - first).clamp(min=0, max=chunk)
    return Layout(chunks, sequences, tokens, 0, torch.stack([first, count], dim=1), bounds)


def launch_options(device: torch.device) -> dict[str, int]:
    """Of kernels that work on one chunk at a time, which need all registers that there are."""
    options = {"num_warps": 4, "num_stages": 1}
    return options | {"maxnreg": 255} if device_kind(device).backend == "cuda" else options


def tile(width: int) -> int:
    """Channels that a program works on at once; masks of a part of 32 cost too many registers."""
    return 16 if width % 32 else 32


@triton.jit
def locate(i_m, p_table, tokens, per_sequence, CHUNK: tl.constexpr):
    """First token of a chunk in all of [B·T], as int64, and its number of tokens."""
    if p_table is None:
        i_c = i_m % per_sequence
        first = (i_m // per_sequence).to(tl.int64) * tokens + i_c * CHUNK
        count = tl.minimum(tokens - i_c * CHUNK, CHUNK)
    else:
        first = tl.load(p_table + 2 * i_m.to(tl.int64))
        count = tl.load(p_table + 2 * i_m.to(tl.int64) + 1).to(tl.int32)
    return first, count


@triton.jit
def decays(p_log_decay, o_key, m_key, CHUNK: tl.constexpr):
    """log_decay [C, K], g - m [C, K], m [1, K] and the sum g_C [1, K] of some key channels."""
    b_log_decay = load(p_log_decay, o_key, m_key)
    b_g = tl.cumsum(b_log_decay, axis=0)
    i_row = tl.arange(0, CHUNK)[:, None]
    b_middle = tl.sum(tl.where(i_row == (CHUNK - 1) // 2, b_g, 0.0), axis=0)[None, :]
    b_end = tl.sum(b_log_decay, axis=0)[None, :]
    return b_log_decay, b_g - b_middle, b_middle, b_end


@triton.jit
def earlier(b_scores, CHUNK: tl.constexpr):
    """Keep the scores of columns before the row: what alpha sees."""
    return tl.where(tl.arange(0, CHUNK)[:, None] > tl.arange(0, CHUNK)[None, :], b_scores, 0.0)


@triton.jit
def until(b_scores, CHUNK: tl.constexpr):
    """Keep the scores of columns up to the row: what r sees."""
    return tl.where(tl.arange(0, CHUNK)[:, None] >= tl.arange(0, CHUNK)[None, :], b_scores, 0.0)


@triton.jit
def inverse(b_a, CHUNK: tl.constexpr, PRECISION: tl.constexpr):
    """(I - A)^-1 [C, C] of a strictly lower A: substitution in small blocks, which are merged.

    A product of powers, (I + A)(I + A²)..., would be shorter and explodes where a key repeats.
    """
    BLOCKS: tl.constexpr = CHUNK // INNER
    i_row, i_column = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    i_block = tl.arange(0, BLOCKS)
    m_own = i_block[:, None, None, None] == i_block[None, None, :, None]
    b_blocks = tl.where(m_own, tl.reshape(b_a, (BLOCKS, INNER, BLOCKS, INNER)), 0.0)
    b_blocks = tl.sum(b_blocks, axis=2)  # the blocks on the diagonal
    i_inner = tl.arange(0, INNER)
    m_diagonal = i_inner[None, :, None] == i_inner[None, None, :]
    b_inner = tl.where(m_diagonal & (i_block[:, None, None] >= 0), 1.0, 0.0)
    for i in range(1, INNER):
        m_row = i_inner[None, :, None] == i
        b_row = tl.sum(tl.where(m_row, b_blocks, 0.0), axis=1)
        b_row = tl.sum(b_row[:, :, None] * b_inner, axis=1)
        b_inner = tl.where(m_row, b_inner + b_row[:, None, :], b_inner)
    b_inverse = tl.where(m_own, b_inner[:, :, None, :], 0.0)
    b_inverse = tl.reshape(b_inverse, (CHUNK, CHUNK))
    # [[X, 0], [L, Y]]^-1 has Y^-1 L X^-1 below the diagonal (with I - A: the sign is L's).
    for level in tl.static_range(2):
        if (INNER << level) < CHUNK:
            size: tl.constexpr = INNER << level
            m_below = (i_row // size == i_column // size + 1) & (i_row // size % 2 == 1)
            b_below = dot(tl.where(m_below, b_a, 0.0), b_inverse, PRECISION)
            b_inverse += dot(b_inverse, b_below, PRECISION)
    return b_inverse


@triton.jit
def matrices(
    p_r, p_log_decay, p_k, p_alpha, p_beta,
    count,
    H: tl.constexpr, K: tl.constexpr, TILE_K: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """I = (I - A_ab)^-1, I A_ak, A_rb I and A_rk + A_rb I A_ak, all [C, C]; pointers to the chunk.

    U = I alpha S^T + I A_ak V and Y = (r + A_rb I alpha) S^T + (A_rk + A_rb I A_ak) V.
    """
    i_row = tl.arange(0, CHUNK)[:, None]
    b_ab = tl.zeros((CHUNK, CHUNK), tl.float32)
    b_ak, b_rb, b_rk = b_ab, b_ab, b_ab
    for start in range(0, K, TILE_K):
        o_k = start + tl.arange(0, TILE_K)[None, :]
        o_key, m_key = i_row * (H * K) + o_k, (i_row < count) & (o_k < K)
        b_log_decay, b_centred, _, _ = decays(p_log_decay, o_key, m_key, CHUNK)
        b_alpha = load(p_alpha, o_key, m_key) * tl.exp(b_centred - b_log_decay)
        b_beta = tl.trans(load(p_beta, o_key, m_key) * tl.exp(-b_centred))
        b_ab += dot(b_alpha, b_beta, PRECISION)
        b_r = load(p_r, o_key, m_key) * tl.exp(b_centred)
        b_rb += dot(b_r, b_beta, PRECISION)
        b_k = tl.trans(load(p_k, o_key, m_key) * tl.exp(-b_centred))
        b_ak += dot(b_alpha, b_k, PRECISION)
        b_rk += dot(b_r, b_k, PRECISION)
    b_inverse = inverse(earlier(b_ab, CHUNK), CHUNK, INVERSE)
    b_ak = dot(b_inverse, earlier(b_ak, CHUNK), PRECISION)
    b_rb = until(b_rb, CHUNK)
    b_rk = until(b_rk, CHUNK) + dot(b_rb, b_ak, PRECISION)
    return b_inverse, b_ak, dot(b_rb, b_inverse, PRECISION), b_rk
