# mypy: allow-untyped-defs, allow-incomplete-defs
"""Gradients of r, log_decay, k, alpha and beta, for all chunks in parallel.

From S before and dS' after a chunk, from U of the forward pass and its gradient X, which
`triton_carry.py` made. Axes and names as in `triton_chunk.py`, equations as in README.md.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvx_kernels.tools.sizes import ceil_div
from rwkvx_kernels.tools.triton_device import device_kind
from rwkvx_kernels.tools.triton_products import load_exact, product
from rwkvx_kernels.tools.triton_tiles import dot, load, precision, store
from rwkvx_kernels.wkv7.triton_chunk import Layout, decays, load_decay, locate, stage


@triton.jit
def _dot_stored(a, b, PRECISION: tl.constexpr):
    """Of what was stored: nothing is lost in a product of bfloat16 by bfloat16."""
    if a.dtype == tl.bfloat16 and b.dtype == tl.bfloat16:
        return product(a, b, "bf16")
    else:
        return dot(a.to(tl.float32), b.to(tl.float32), PRECISION)


@triton.jit
def _outer(
    p_left, p_right,
    count,
    H: tl.constexpr, V: tl.constexpr, TILE_V: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """left right^T [C, C] of two [C, V]; pointers to the chunk."""
    i_row = tl.arange(0, CHUNK)[:, None]
    b_product = tl.zeros((CHUNK, CHUNK), tl.float32)
    for start in range(0, V, TILE_V):
        o_v = start + tl.arange(0, TILE_V)[None, :]
        o_value, m_value = i_row * (H * V) + o_v, (i_row < count) & (o_v < V)
        b_right = tl.trans(load_exact(p_right, o_value, m_value))
        b_product += _dot_stored(load_exact(p_left, o_value, m_value), b_right, PRECISION)
    return b_product


@triton.jit
def _through(
    p_left, p_state,
    i_k, count,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, TILE_K: tl.constexpr, TILE_V: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """left S [C, K] of [C, V] and [V, K], from key channel i_k on; pointers to the chunk."""
    i_row = tl.arange(0, CHUNK)[:, None]
    o_k = i_k + tl.arange(0, TILE_K)[None, :]
    b_product = tl.zeros((CHUNK, TILE_K), tl.float32)
    for start in range(0, V, TILE_V):
        o_v = start + tl.arange(0, TILE_V)
        o_value, m_value = i_row * (H * V) + o_v[None, :], (i_row < count) & (o_v[None, :] < V)
        o_state, m_state = o_v[:, None] * K + o_k, (o_v[:, None] < V) & (o_k < K)
        b_left = load_exact(p_left, o_value, m_value)
        b_state = load_exact(p_state, o_state, m_state)
        b_product += _dot_stored(b_left, b_state, PRECISION)
    return b_product


@triton.jit(do_not_specialize=["tokens", "per_sequence"])
def _keys_kernel(
    p_r, p_log_decay, p_k, p_v, p_alpha, p_beta, p_dy, p_u, p_x, p_state, p_dstate, p_table, p_dr,
    p_dlog_decay, p_dk, p_dalpha, p_dbeta,
    tokens, per_sequence,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, TILE_K: tl.constexpr, TILE_V: tl.constexpr,
    CHUNK: tl.constexpr, LENGTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (K + TILE_K - 1) // TILE_K
    i_m, i_h = tl.program_id(0) // TILES // H, tl.program_id(0) // TILES % H
    i_s, i_within = i_m // (LENGTH // CHUNK), i_m % (LENGTH // CHUNK)
    first, count, i_chunk = locate(i_s, p_table, tokens, per_sequence, LENGTH, CHUNK)
    count = tl.minimum(count - i_within * CHUNK, CHUNK)
    if count <= 0:
        return
    i_first = (first + i_within * CHUNK) * H + i_h
    o_matrix = ((i_chunk + i_within) * H + i_h).to(tl.int64) * (V * K)
    p_r, p_log_decay, p_k = p_r + i_first * K, p_log_decay + i_first * K, p_k + i_first * K
    p_alpha, p_beta = p_alpha + i_first * K, p_beta + i_first * K
    p_dr, p_dlog_decay, p_dk = p_dr + i_first * K, p_dlog_decay + i_first * K, p_dk + i_first * K
    p_dalpha, p_dbeta = p_dalpha + i_first * K, p_dbeta + i_first * K
    p_v, p_dy, p_u, p_x = (
        p_v + i_first * V,
        p_dy + i_first * V,
        p_u + i_first * V,
        p_x + i_first * V,
    )
    p_state, p_dstate = p_state + o_matrix, p_dstate + o_matrix
    i_row = tl.arange(0, CHUNK)[:, None]
    i_k = (tl.program_id(0) % TILES) * TILE_K
    o_k = i_k + tl.arange(0, TILE_K)[None, :]
    o_key, m_key = i_row * (H * K) + o_k, (i_row < count) & (o_k < K)
    b_dend = tl.zeros((1, TILE_K), tl.float32)  # through the decay of the state to the end
    for start in range(0, V, TILE_V):
        o_v = start + tl.arange(0, TILE_V)[:, None]
        o_state, m_state = o_v * K + o_k, (o_v < V) & (o_k < K)
        b_product = load(p_state, o_state, m_state) * load(p_dstate, o_state, m_state)
        b_dend += tl.sum(b_product, axis=0)[None, :]
    _, b_centred, b_middle, b_rest = decays(p_log_decay, o_key, m_key, CHUNK)
    b_dbeta = _through(p_u, p_dstate, i_k, count, H, K, V, TILE_K, TILE_V, CHUNK, PRECISION)
    b_dk = _through(p_v, p_dstate, i_k, count, H, K, V, TILE_K, TILE_V, CHUNK, PRECISION)
    b_dbeta, b_dk = b_dbeta * tl.exp(b_rest)[None, :], b_dk * tl.exp(b_rest)[None, :]
    b_shrink = tl.exp(-b_centred)
    b_dg = load(p_beta, o_key, m_key) * b_dbeta + load(p_k, o_key, m_key) * b_dk
    b_dend = b_dend * tl.exp(b_middle + b_rest)[None, :] + tl.sum(b_dg * b_shrink, axis=0)[None, :]
    # A log decay is part of g_i, and so of every exponent, from its own token on: sums to the end.
    b_dlog_decay = tl.zeros((CHUNK, TILE_K), tl.float32)
    # alpha with X, then r with dY: in a loop, and everything read
    # again where it is used, as all at once would not fit into registers.
    for i in range(2):
        p_query, p_dquery, p_left = p_alpha, p_dalpha, p_x
        b_grow = b_centred
        if i == 0:
            b_grow -= load_decay(p_log_decay, o_key, m_key)
        else:
            p_query, p_dquery, p_left = p_r, p_dr, p_dy
        b_grow = tl.exp(b_grow)
        b_query = load(p_query, o_key, m_key) * b_grow
        b_dquery = _through(p_left, p_state, i_k, count, H, K, V, TILE_K, TILE_V, CHUNK, PRECISION)
        b_dquery *= tl.exp(b_middle)[None, :]
        # dA = [X; dY] [U; V]^T
        m_seen = i_row + i > tl.arange(0, CHUNK)[None, :]
        b_da = _outer(p_left, p_u, count, H, V, TILE_V, CHUNK, PRECISION)
        b_da = tl.where(m_seen, b_da, 0.0)
        b_key = load(p_beta, o_key, m_key) * tl.exp(-b_centred)
        b_dquery += dot(b_da, b_key, PRECISION)
        b_dbeta += dot(tl.trans(b_da), b_query, PRECISION)
        b_da = _outer(p_left, p_v, count, H, V, TILE_V, CHUNK, PRECISION)
        b_da = tl.where(m_seen, b_da, 0.0)
        b_key = load(p_k, o_key, m_key) * tl.exp(-b_centred)
        b_dquery += dot(b_da, b_key, PRECISION)
        b_dk += dot(tl.trans(b_da), b_query, PRECISION)
        store(p_dquery, o_key, b_dquery * b_grow, m_key)
        b_dg = b_dquery * b_query
        b_dlog_decay += tl.sum(b_dg, axis=0)[None, :] - tl.cumsum(b_dg, axis=0)
        if i == 1:  # alpha's exponent stops before its own
            b_dlog_decay += b_dg
    b_shrink = tl.exp(-b_centred)
    b_dbeta, b_dk = b_dbeta * b_shrink, b_dk * b_shrink
    b_dg = b_dbeta * load(p_beta, o_key, m_key) + b_dk * load(p_k, o_key, m_key)
    b_dlog_decay += b_dend - tl.sum(b_dg, axis=0)[None, :] + tl.cumsum(b_dg, axis=0) - b_dg
    store(p_dlog_decay, o_key, b_dlog_decay, m_key)
    store(p_dbeta, o_key, b_dbeta, m_key)
    store(p_dk, o_key, b_dk, m_key)


def tile(width: int) -> int:
    """Channels that a program works on at once; masks of a part of 32 cost too many registers."""
    return 16 if width % 32 else 32


def gradients(
    tensors: list[Tensor],
    dy: Tensor,
    u: Tensor,
    x: Tensor,
    states: Tensor,
    dstates: Tensor,
    layout: Layout,
) -> list[Tensor]:
    """Launch over all chunks: gradients of r, log_decay, k, alpha, beta.

    u, x [B, T, H, V]: U and its gradient. states, dstates [chunks, H, V, K]: the state before each
    chunk, the gradient of that after it.
    """
    r, v = tensors[0], tensors[3]
    heads, key, value = *r.shape[2:], v.shape[3]
    found = [torch.empty_like(x) for i, x in enumerate(tensors) if i != 3]
    plan, options = layout.plan, stage("gradients", r, v)
    tile_k, tile_v = tile(key), tile(value)
    # All registers that there are.
    most = {"maxnreg": 255} if device_kind(r.device).backend == "cuda" else {}
    programs = plan.segments * (plan.length // plan.chunk) * heads * ceil_div(key, tile_k)
    if r.numel():
        _keys_kernel[(programs,)](
            *(*tensors, dy, u, x, states, dstates, layout.table, *found, *layout.arguments),
            H=heads, K=key, V=value, TILE_K=tile_k, TILE_V=tile_v,
            CHUNK=plan.chunk, LENGTH=plan.length, PRECISION=precision(r.dtype, r.device),
            **options.launch, **most,
        )  # fmt: skip
    return found
