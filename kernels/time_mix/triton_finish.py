# mypy: allow-untyped-defs, allow-incomplete-defs
"""Group norm, bonus and gate after the recurrence, in one pass, and their gradients.

Axes and names as in `triton_keys.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvx_kernels.time_mix.triton_keys import launch
from rwkvx_kernels.tools.sizes import ceil_div
from rwkvx_kernels.tools.triton_tiles import load, normalise, store


@triton.jit(do_not_specialize=["tokens"])
def _forward_kernel(
    p_y, p_r, p_key, p_value, p_g, p_r_k, p_weight, p_bias, p_out,
    tokens, eps, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    i_h = tl.program_id(0) % H
    i_t = (tl.program_id(0) // H).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    o_d = tl.arange(0, BLOCK_D)[None, :]
    o_c, m_c = i_h * D + o_d, o_d < D
    o_x, m_x = i_t * (H * D) + o_c, (i_t < tokens) & m_c
    b_y, _ = normalise(load(p_y, o_x, m_x), m_c, eps, D)
    b_y = b_y * load(p_weight, o_c, m_c) + load(p_bias, o_c, m_c)
    b_bonus = load(p_r, o_x, m_x) * load(p_key, o_x, m_x) * load(p_r_k, o_c, m_c)
    b_y += tl.sum(b_bonus, axis=1, keep_dims=True) * load(p_value, o_x, m_x)
    store(p_out, o_x, b_y * load(p_g, o_x, m_x), m_x)


@triton.jit(do_not_specialize=["tokens", "parts"])
def _backward_kernel(
    p_dout, p_y, p_r, p_key, p_value, p_g, p_r_k, p_weight, p_bias,
    p_dy, p_dvalue, p_dg, p_dbonus, p_partial,
    tokens, parts, eps, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    i_h, i_part = tl.program_id(0) % H, tl.program_id(0) // H
    o_d = tl.arange(0, BLOCK_D)[None, :]
    o_c, m_c = i_h * D + o_d, o_d < D
    b_weight, b_bias, b_r_k = (
        load(p_weight, o_c, m_c),
        load(p_bias, o_c, m_c),
        load(p_r_k, o_c, m_c),
    )
    b_dr_k = tl.zeros((1, BLOCK_D), tl.float32)
    b_dweight, b_dbias = b_dr_k, b_dr_k
    for step in range(STEPS):
        i_t = (i_part.to(tl.int64) * STEPS + step) * ROWS + tl.arange(0, ROWS)[:, None]
        o_x, m_x = i_t * (H * D) + o_c, (i_t < tokens) & m_c
        b_y, b_inverse = normalise(load(p_y, o_x, m_x), m_c, eps, D)
        b_rk = load(p_r, o_x, m_x) * load(p_key, o_x, m_x)
        b_bonus = tl.sum(b_rk * b_r_k, axis=1, keep_dims=True)
        b_value, b_dout = load(p_value, o_x, m_x), load(p_dout, o_x, m_x)
        store(p_dg, o_x, b_dout * (b_y * b_weight + b_bias + b_bonus * b_value), m_x)
        b_dsum = b_dout * load(p_g, o_x, m_x)
        store(p_dvalue, o_x, b_dsum * b_bonus, m_x)
        b_dbonus = tl.sum(b_dsum * b_value, axis=1, keep_dims=True)
        tl.store(p_dbonus + i_t * H + i_h, b_dbonus, mask=i_t < tokens)
        b_dr_k += tl.sum(b_dbonus * b_rk, axis=0, keep_dims=True)
        b_dbias += tl.sum(b_dsum, axis=0, keep_dims=True)
        b_dweight += tl.sum(b_dsum * b_y, axis=0, keep_dims=True)
        b_dy = b_dsum * b_weight
        b_mean = tl.sum(b_dy, axis=1, keep_dims=True) / D
        b_along = tl.sum(b_dy * b_y, axis=1, keep_dims=True) / D
        store(p_dy, o_x, (b_dy - b_mean - b_y * b_along) * b_inverse, m_x)
    p_partial += i_part.to(tl.int64) * (H * D)
    o_weight = parts.to(tl.int64) * (H * D)
    store(p_partial, o_c, b_dr_k, m_c)
    store(p_partial + o_weight, o_c, b_dweight, m_c)
    store(p_partial + 2 * o_weight, o_c, b_dbias, m_c)


def finish(tensors: list[Tensor], weights: list[Tensor], eps: float) -> Tensor:
    """Launch: (norm(y) + bonus value) g [B, T, C] of y, r, key, value, g.

    weights: r_k [H, D], norm weight and bias [C].
    """
    y, heads = tensors[0], weights[0].shape[0]
    out = torch.empty_like(tensors[4])
    options, constants = launch("finish", y, heads)
    count = y.shape[0] * y.shape[1]
    if y.numel():
        grid = (ceil_div(count, options.rows) * heads,)
        _forward_kernel[grid](*tensors, *weights, out, count, eps, **constants)
    return out


def gradients(
    dout: Tensor, tensors: list[Tensor], weights: list[Tensor], eps: float
) -> tuple[list[Tensor], Tensor]:
    """Launch: gradients of y, value, g, bonus [B, T, H]; of weights [3, C] (float32).

    Those of r and key follow from that of the bonus: `triton_keys.gradients` adds them.
    """
    y, heads = tensors[0], weights[0].shape[0]
    new = [torch.empty_like(y) for _ in range(3)]
    new.append(y.new_empty(*y.shape[:2], heads, dtype=torch.float32))
    options, constants = launch("finish_gradients", y, heads)
    count = y.shape[0] * y.shape[1]
    parts = ceil_div(count, options.rows * options.columns)
    partial = y.new_empty(3, parts, y.shape[-1], dtype=torch.float32)
    if y.numel():
        _backward_kernel[(parts * heads,)](
            dout, *tensors, *weights, *new, partial, count, parts, eps,
            **constants, STEPS=options.columns,
        )  # fmt: skip
    return new, partial.sum(dim=1)
