# mypy: allow-untyped-defs, allow-incomplete-defs
"""The whole time mix between its projections for one or a few new tokens, in one launch.

Decoding is bound by launches: nothing between the projections is worth one of its own. Axes and
names as in `triton_keys.py`. A program has one head of one sequence, the state in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvx_kernels.time_mix.options import TABLE
from rwkvx_kernels.time_mix.triton_keys import SCALE, keys
from rwkvx_kernels.tools.sizes import next_power_of_2
from rwkvx_kernels.tools.triton_options import options_for
from rwkvx_kernels.tools.triton_tiles import load, normalise, store


@triton.jit(do_not_specialize=["tokens"])
def _step_kernel(
    p_r, p_w, p_k, p_v, p_a, p_g, p_mix, p_first,
    p_w0, p_a0, p_k_k, p_k_a, p_v0, p_r_k, p_weight, p_bias, p_state, p_offsets, p_out, p_final,
    tokens, eps, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_nh = tl.program_id(0)
    i_n, i_h = (i_nh // H).to(tl.int64), i_nh % H
    if p_offsets is None:
        first = i_n * tokens
    else:
        first = tl.load(p_offsets + i_n).to(tl.int64)
        tokens = (tl.load(p_offsets + i_n + 1).to(tl.int64) - first).to(tl.int32)
    o_k, o_v = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_D)[:, None]
    m_k, m_v = o_k < D, o_v < D
    o_ck, o_cv = i_h * D + o_k, i_h * D + o_v
    o_state, m_state = i_nh.to(tl.int64) * (D * D) + o_v * D + o_k, m_v & m_k
    b_state = tl.load(p_state + o_state, mask=m_state, other=0.0)
    for t in range(tokens):
        o_row = (first + t) * (H * D)
        o_key, o_value = o_row + o_ck, o_row + o_cv
        b_log_decay = tl.sigmoid(load(p_w0, o_ck, m_k) + load(p_w, o_key, m_k)) * SCALE
        b_a = tl.sigmoid(load(p_a0, o_ck, m_k) + load(p_a, o_key, m_k))
        b_k_k, b_k_a = load(p_k_k, o_ck, m_k), load(p_k_a, o_ck, m_k)
        b_kk, _, b_key = keys(load(p_k, o_key, m_k), b_a, b_k_k, b_k_a)
        b_r, b_v = load(p_r, o_key, m_k), load(p_v, o_value, m_v)
        if p_mix is not None:
            b_mix = tl.sigmoid(load(p_v0, o_cv, m_v) + load(p_mix, o_value, m_v))
            b_v += b_mix * (load(p_first, o_value, m_v) - b_v)
        b_removed = tl.sum(b_state * -b_kk, axis=1, keep_dims=True)
        b_state = b_state * tl.exp(b_log_decay) + b_removed * (b_kk * b_a) + b_v * b_key
        b_y = tl.sum(b_state * b_r, axis=1, keep_dims=True)
        b_y, _ = normalise(tl.trans(b_y), m_k, eps, D)
        b_y = tl.trans(b_y) * load(p_weight, o_cv, m_v) + load(p_bias, o_cv, m_v)
        b_bonus = tl.sum(b_r * b_key * load(p_r_k, o_ck, m_k), axis=1, keep_dims=True)
        store(p_out, o_value, (b_y + b_bonus * b_v) * load(p_g, o_value, m_v), m_v)
    tl.store(p_final + o_state, b_state, mask=m_state)


def step(
    tokens: list[Tensor],
    residual: list[Tensor],
    weights: list[Tensor],
    eps: float,
    state: Tensor,
    cu_seqlens: Tensor | None,
) -> list[Tensor]:
    """Launch: what the output projection reads [B, T, C], and the final state.

    tokens: r, w, k, v, a, g. residual: mix and v_first, or nothing. weights: w0, a0, k_k, k_a, r_k,
    norm weight and bias and, with a residual, v0.
    """
    out, final = torch.empty_like(tokens[3]), torch.empty_like(state)
    heads, size = state.shape[1:3]
    block = next_power_of_2(size)
    options = options_for(TABLE, "step", tokens[0].dtype, size, tokens[0].device)
    v0 = weights[7] if residual else None
    if len(state) * heads:
        _step_kernel[(len(state) * heads,)](
            *tokens, *residual or (None, None), *weights[:4], v0, *weights[4:7],
            state, cu_seqlens, out, final, tokens[0].shape[1], eps,
            H=heads, D=size, BLOCK_D=block, **options.launch,
        )  # fmt: skip
    return [out, final]
