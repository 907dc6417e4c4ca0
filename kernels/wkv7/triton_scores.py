# mypy: allow-untyped-defs, allow-incomplete-defs
"""A chunk's scores and their inverse for gradients, of which a program has one chunk.

Names and symbols as in `triton_chunk.py`; products in the precision of PRECISION.
"""

import torch
import triton
import triton.language as tl

from rwkvx_kernels.tools.triton_device import device_kind
from rwkvx_kernels.tools.triton_options import Options
from rwkvx_kernels.tools.triton_tiles import dot, load
from rwkvx_kernels.wkv7.triton_chunk import locate

# Substitution row by row inside blocks of so many tokens; larger ones are merged from them.
INNER: tl.constexpr = tl.constexpr(16)


def launch_options(options: Options, device: torch.device) -> dict[str, int]:
    """Of kernels that work on one chunk at a time, which need all registers that there are."""
    most = {"maxnreg": 255} if device_kind(device).backend == "cuda" else {}
    return options.launch | most


def tile(width: int) -> int:
    """Channels that a program works on at once; masks of a part of 32 cost too many registers."""
    return 16 if width % 32 else 32


@triton.jit
def locate_chunk(
    i_program, p_table, tokens, per_sequence, LENGTH: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """First token (int64), number of tokens (not more than 0: no chunk) and number of a chunk."""
    IN_SEGMENT: tl.constexpr = LENGTH // CHUNK
    first, count, i_chunk = locate(
        i_program // IN_SEGMENT, p_table, tokens, per_sequence, LENGTH, CHUNK
    )
    i_within = i_program % IN_SEGMENT
    count = tl.minimum(count - i_within * CHUNK, CHUNK)
    return first + i_within * CHUNK, count, i_chunk + i_within


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
