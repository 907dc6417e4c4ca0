# mypy: allow-untyped-defs, allow-incomplete-defs
"""Everything about a chunk that does not need the state before it, for all chunks in parallel.

    y = Y0 + R S^T        S' = S (diag(decay) + P) + D

Axes and names as in `triton_chunk.py`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvx_kernels.tools.triton_tiles import dot, load, precision, store
from rwkvx_kernels.wkv7.triton_chunk import Layout, decays, launch_options, locate, matrices, tile


class Prepared(NamedTuple):
    """decay [M, H, K], p [M, H, K, K], d [M, H, V, K] float32; r [B, T, H, K], y [B, T, H, V].

    For the backward pass `d` is dY^T R instead, and r and y are None.
    """

    decay: Tensor
    p: Tensor
    d: Tensor
    r: Tensor | None
    y: Tensor | None


@triton.jit(do_not_specialize=["tokens", "per_sequence"])
def _prepare_kernel(
    p_r, p_log_decay, p_k, p_v, p_alpha, p_beta, p_dy, p_table, p_decay, p_p, p_d, p_r_out, p_y,
    tokens, per_sequence,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, TILE_K: tl.constexpr, TILE_V: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    i_m, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    first, count = locate(i_m, p_table, tokens, per_sequence, CHUNK)
    if count == 0:
        return
    i_mh = tl.program_id(0).to(tl.int64)
    i_first = first * H + i_h
    p_r, p_log_decay, p_k = p_r + i_first * K, p_log_decay + i_first * K, p_k + i_first * K
    p_alpha, p_beta = p_alpha + i_first * K, p_beta + i_first * K
    p_p, p_d = p_p + i_mh * (K * K), p_d + i_mh * (V * K)
    if p_dy is None:
        p_v, p_y, p_r_out = p_v + i_first * V, p_y + i_first * V, p_r_out + i_first * K
    else:
        p_dy += i_first * V
    b_inverse, b_ak, b_rb, b_rk = matrices(
        p_r, p_log_decay, p_k, p_alpha, p_beta, count, H, K, TILE_K, CHUNK, PRECISION, INVERSE
    )
    i_row = tl.arange(0, CHUNK)[:, None]
    for start_k in range(0, K, TILE_K):
        o_k = start_k + tl.arange(0, TILE_K)
        m_k = o_k[None, :] < K
        o_key, m_key = i_row * (H * K) + o_k[None, :], (i_row < count) & m_k
        b_log_decay, b_centred, b_middle, b_end = decays(p_log_decay, o_key, m_key, CHUNK)
        tl.store(p_decay + i_mh * K + o_k[None, :], tl.exp(b_end), mask=m_k)
        # From here on decayed from the start of the chunk, or to its end: nothing grows.
        b_alpha = load(p_alpha, o_key, m_key) * tl.exp(b_centred + b_middle - b_log_decay)
        b_r = load(p_r, o_key, m_key) * tl.exp(b_centred + b_middle)
        b_r += dot(b_rb, b_alpha, PRECISION)
        b_w = tl.trans(dot(b_inverse, b_alpha, PRECISION))
        for start in range(0, K, TILE_K):  # P = W^T beta
            o_column = start + tl.arange(0, TILE_K)[None, :]
            o_beta, m_beta = i_row * (H * K) + o_column, (i_row < count) & (o_column < K)
            _, b_c, b_m, b_e = decays(p_log_decay, o_beta, m_beta, CHUNK)
            b_beta = load(p_beta, o_beta, m_beta) * tl.exp(b_e - b_m - b_c)
            m_p = (o_k[:, None] < K) & (o_column < K)
            tl.store(p_p + o_k[:, None] * K + o_column, dot(b_w, b_beta, PRECISION), mask=m_p)
        if p_dy is None:
            store(p_r_out, o_key, b_r, m_key)
            # D = U^T beta + V^T k with U = I A_ak V
            b_to_end = tl.exp(b_end - b_middle - b_centred)
            b_k = load(p_k, o_key, m_key) * b_to_end
            b_beta = load(p_beta, o_key, m_key) * b_to_end
            b_k += dot(tl.trans(b_ak), b_beta, PRECISION)
        for start in range(0, V, TILE_V):  # D, or dY^T R
            o_v = start + tl.arange(0, TILE_V)
            o_value = i_row * (H * V) + o_v[None, :]
            m_value = (i_row < count) & (o_v[None, :] < V)
            if p_dy is None:
                b_v = load(p_v, o_value, m_value)
                if start_k == 0:
                    b_y = dot(b_rk, b_v, PRECISION)
                    store(p_y, o_value, b_y, m_value)
                b_d = dot(tl.trans(b_v), b_k, PRECISION)
            else:
                b_d = dot(tl.trans(load(p_dy, o_value, m_value)), b_r, PRECISION)
            m_d = (o_v[:, None] < V) & m_k
            tl.store(p_d + o_v[:, None] * K + o_k[None, :], b_d, mask=m_d)


def prepare(tensors: list[Tensor], layout: Layout, chunk: int, dy: Tensor | None) -> Prepared:
    """Launch over all chunks of r, log_decay, k, v, alpha, beta; for the backward pass with dY."""
    r, v = tensors[0], tensors[3]
    heads, key, value = *r.shape[2:], v.shape[3]
    blocks = (layout.chunks, heads)
    exact = precision(torch.float32, r.device)
    out = Prepared(
        decay=r.new_empty(*blocks, key, dtype=torch.float32),
        p=r.new_empty(*blocks, key, key, dtype=torch.float32),
        d=r.new_empty(*blocks, value, key, dtype=torch.float32),
        r=torch.empty_like(r) if dy is None else None,
        y=torch.empty_like(v) if dy is None else None,
    )
    if layout.chunks * heads:
        _prepare_kernel[(layout.chunks * heads,)](
            *tensors, dy, layout.table, *out, layout.tokens, layout.per_sequence,
            H=heads, K=key, V=value, TILE_K=tile(key), TILE_V=tile(value), CHUNK=chunk,
            PRECISION=precision(r.dtype, r.device), INVERSE=exact, **launch_options(r.device),
        )  # fmt: skip
    return out
