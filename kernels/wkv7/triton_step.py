# mypy: allow-untyped-defs, allow-incomplete-defs
"""WKV7 for one or a few new tokens: the recurrence itself, the state in registers.

Axes: B sequences, T time, H heads, K key channels, V value channels. Names: i_ index, p_ pointer,
b_ tile in registers, o_ offset, m_ mask. A program has one head of one sequence and some value
channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvx_kernels.tools.sizes import ceil_div, next_power_of_2
from rwkvx_kernels.tools.triton_tiles import load, store

TILE_V = 16


@triton.jit
def recur(
    p_r, p_log_decay, p_k, p_v, p_alpha, p_beta, p_y, b_state, i_first, tokens, o_k, o_v,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """The recurrence, from row i_first of [B·T·H] on: stores y, returns the state after it."""
    m_k, m_v = o_k < K, o_v < V
    for t in range(tokens):
        o_row = i_first + t * H
        o_key, o_value = o_row * K + o_k, o_row * V + o_v
        b_r, b_log_decay = load(p_r, o_key, m_k), load(p_log_decay, o_key, m_k)
        b_k, b_v = load(p_k, o_key, m_k), load(p_v, o_value, m_v)
        b_alpha, b_beta = load(p_alpha, o_key, m_k), load(p_beta, o_key, m_k)
        b_u = tl.sum(b_state * b_alpha[None, :], axis=1)
        b_state = b_state * tl.exp(b_log_decay)[None, :]
        b_state += b_u[:, None] * b_beta[None, :] + b_v[:, None] * b_k[None, :]
        b_y = tl.sum(b_state * b_r[None, :], axis=1)
        store(p_y, o_value, b_y, m_v)
    return b_state


@triton.jit(do_not_specialize=["tokens"])
def _step_kernel(
    p_r, p_log_decay, p_k, p_v, p_alpha, p_beta, p_state, p_offsets, p_y, p_final,
    tokens,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = (V + TILE - 1) // TILE
    i_nh = tl.program_id(0) // tiles
    i_n, i_h = (i_nh // H).to(tl.int64), i_nh % H
    if p_offsets is None:
        first = i_n * tokens
    else:
        first = tl.load(p_offsets + i_n).to(tl.int64)
        tokens = (tl.load(p_offsets + i_n + 1).to(tl.int64) - first).to(tl.int32)
    o_k = tl.arange(0, BLOCK_K)
    o_v = (tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)
    m_k, m_v = o_k < K, o_v < V
    o_state = i_nh.to(tl.int64) * (V * K) + o_v[:, None] * K + o_k[None, :]
    m_state = m_v[:, None] & m_k[None, :]
    b_state = tl.load(p_state + o_state, mask=m_state, other=0.0)
    b_state = recur(
        p_r, p_log_decay, p_k, p_v, p_alpha, p_beta, p_y, b_state, first * H + i_h, tokens, o_k,
        o_v, H, K, V,
    )  # fmt: skip
    tl.store(p_final + o_state, b_state, mask=m_state)


def step(
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    beta: Tensor,
    state: Tensor,
    offsets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y [B, T, H, V] and the final state [B, H, V, K] of contiguous tensors, shaped as for `wkv7`.

    Time grows with T, so this is for few tokens; there is no backward pass.
    """
    heads, width = v.shape[2:]
    y, final = torch.empty_like(v), torch.empty_like(state)
    grid = (state.shape[0] * heads * ceil_div(width, TILE_V),)
    if grid[0]:
        _step_kernel[grid](
            r, log_decay, k, v, alpha, beta, state, offsets, y, final, r.shape[1],
            H=heads, K=r.shape[3], V=width, BLOCK_K=next_power_of_2(r.shape[3]), TILE=TILE_V,
            num_warps=1,
        )  # fmt: skip
    return y, final
