# mypy: allow-untyped-defs, allow-incomplete-defs
"""From what the projections give to what the recurrence reads, in one pass, and its gradients.

Axes: T tokens of all sequences, H heads, D head size, C = H·D. Names: i_ index, p_ pointer,
b_ tile in registers, o_ offset, m_ mask. A program has one head of ROWS tokens, backward of STEPS
times as many. Without a value residual its pointers (mix, first, value, v0) are None.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvx_kernels.time_mix.common import LOG_DECAY_SCALE
from rwkvx_kernels.time_mix.options import TABLE
from rwkvx_kernels.tools.sizes import ceil_div, next_power_of_2
from rwkvx_kernels.tools.triton_options import Options, options_for
from rwkvx_kernels.tools.triton_tiles import load, store

SCALE: tl.constexpr = tl.constexpr(LOG_DECAY_SCALE)


@triton.jit
def keys(b_k, b_a, b_k_k, b_k_a):
    """kk, one over the length that it had, and the key that is written; channels come last."""
    b_kk = b_k * b_k_k
    # As torch.nn.functional.normalize: x / max(|x|, 1e-12).
    b_length = tl.sqrt(tl.sum(b_kk * b_kk, axis=-1, keep_dims=True))
    b_inverse = 1.0 / tl.maximum(b_length, 1e-12)
    return b_kk * b_inverse, b_inverse, b_k * (1.0 + (b_a - 1.0) * b_k_a)


@triton.jit(do_not_specialize=["tokens"])
def _forward_kernel(
    p_w, p_k, p_v, p_a, p_mix, p_first, p_w0, p_a0, p_k_k, p_k_a, p_v0,
    p_log_decay, p_key, p_alpha, p_beta, p_value,
    tokens, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    i_h = tl.program_id(0) % H
    i_t = (tl.program_id(0) // H).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    o_d = tl.arange(0, BLOCK_D)[None, :]
    o_c, m_c = i_h * D + o_d, o_d < D
    o_x, m_x = i_t * (H * D) + o_c, (i_t < tokens) & m_c
    b_decay = tl.sigmoid(load(p_w0, o_c, m_c) + load(p_w, o_x, m_x)) * SCALE
    store(p_log_decay, o_x, b_decay, m_x)
    b_a = tl.sigmoid(load(p_a0, o_c, m_c) + load(p_a, o_x, m_x))
    b_k_k, b_k_a = load(p_k_k, o_c, m_c), load(p_k_a, o_c, m_c)
    b_kk, _, b_key = keys(load(p_k, o_x, m_x), b_a, b_k_k, b_k_a)
    store(p_key, o_x, b_key, m_x)
    store(p_alpha, o_x, -b_kk, m_x)
    store(p_beta, o_x, b_kk * b_a, m_x)
    if p_mix is not None:
        b_mix = tl.sigmoid(load(p_v0, o_c, m_c) + load(p_mix, o_x, m_x))
        b_v = load(p_v, o_x, m_x)
        store(p_value, o_x, b_v + b_mix * (load(p_first, o_x, m_x) - b_v), m_x)


@triton.jit(do_not_specialize=["tokens", "parts"])
def _backward_kernel(
    p_r, p_w, p_k, p_v, p_a, p_mix, p_first, p_w0, p_a0, p_k_k, p_k_a, p_v0, p_r_k,
    p_dbonus, p_dvalue, p_dr_in, p_dlog_decay, p_dkey, p_dvalue_in, p_dalpha, p_dbeta,
    p_dr, p_dw, p_dk, p_dv, p_da, p_dmix, p_dfirst, p_partial,
    tokens, parts, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    i_h, i_part = tl.program_id(0) % H, tl.program_id(0) // H
    o_d = tl.arange(0, BLOCK_D)[None, :]
    o_c, m_c = i_h * D + o_d, o_d < D
    b_k_k, b_k_a, b_r_k = load(p_k_k, o_c, m_c), load(p_k_a, o_c, m_c), load(p_r_k, o_c, m_c)
    b_dw0 = tl.zeros((1, BLOCK_D), tl.float32)
    b_da0, b_dk_k, b_dk_a, b_dv0 = b_dw0, b_dw0, b_dw0, b_dw0
    for step in range(STEPS):
        i_t = (i_part.to(tl.int64) * STEPS + step) * ROWS + tl.arange(0, ROWS)[:, None]
        o_x, m_x = i_t * (H * D) + o_c, (i_t < tokens) & m_c
        b_s = tl.sigmoid(load(p_w0, o_c, m_c) + load(p_w, o_x, m_x))
        b_dw = load(p_dlog_decay, o_x, m_x) * SCALE * b_s * (1.0 - b_s)
        store(p_dw, o_x, b_dw, m_x)
        b_dw0 += tl.sum(b_dw, axis=0, keep_dims=True)
        b_k = load(p_k, o_x, m_x)
        b_a = tl.sigmoid(load(p_a0, o_c, m_c) + load(p_a, o_x, m_x))
        b_kk, b_inverse, b_key = keys(b_k, b_a, b_k_k, b_k_a)
        # The bonus, sum of r key r_k over the head
        b_dbonus = load(p_dbonus, i_t * H + i_h, i_t < tokens)
        store(p_dr, o_x, load(p_dr_in, o_x, m_x) + b_dbonus * b_key * b_r_k, m_x)
        b_dkey = load(p_dkey, o_x, m_x) + b_dbonus * load(p_r, o_x, m_x) * b_r_k
        b_dbeta = load(p_dbeta, o_x, m_x)
        b_da = (b_dbeta * b_kk + b_dkey * b_k * b_k_a) * b_a * (1.0 - b_a)
        store(p_da, o_x, b_da, m_x)
        b_da0 += tl.sum(b_da, axis=0, keep_dims=True)
        # alpha = -kk, beta = kk a; what lies along kk does not change it.
        b_dkk = b_dbeta * b_a - load(p_dalpha, o_x, m_x)
        b_along = tl.sum(b_dkk * b_kk, axis=1, keep_dims=True)
        b_dkk = (b_dkk - tl.where(b_inverse < 1e12, b_along, 0.0) * b_kk) * b_inverse
        b_dk = b_dkk * b_k_k + b_dkey * (1.0 + (b_a - 1.0) * b_k_a)
        store(p_dk, o_x, b_dk, m_x)
        b_dk_k += tl.sum(b_dkk * b_k, axis=0, keep_dims=True)
        b_dk_a += tl.sum(b_dkey * b_k * (b_a - 1.0), axis=0, keep_dims=True)
        b_dv = load(p_dvalue, o_x, m_x) + load(p_dvalue_in, o_x, m_x)
        if p_mix is not None:
            b_mix = tl.sigmoid(load(p_v0, o_c, m_c) + load(p_mix, o_x, m_x))
            b_apart = load(p_first, o_x, m_x) - load(p_v, o_x, m_x)
            b_dmix = b_dv * b_apart * b_mix * (1.0 - b_mix)
            store(p_dmix, o_x, b_dmix, m_x)
            b_dv0 += tl.sum(b_dmix, axis=0, keep_dims=True)
            store(p_dfirst, o_x, b_dv * b_mix, m_x)
            b_dv *= 1.0 - b_mix
        store(p_dv, o_x, b_dv, m_x)
    p_partial += i_part.to(tl.int64) * (H * D)
    o_weight = parts.to(tl.int64) * (H * D)
    store(p_partial, o_c, b_dw0, m_c)
    store(p_partial + o_weight, o_c, b_da0, m_c)
    store(p_partial + 2 * o_weight, o_c, b_dk_k, m_c)
    store(p_partial + 3 * o_weight, o_c, b_dk_a, m_c)
    if p_mix is not None:
        store(p_partial + 4 * o_weight, o_c, b_dv0, m_c)


def launch(stage: str, x: Tensor, heads: int) -> tuple[Options, dict[str, int]]:
    """The options of a stage, and with them the constants of its kernel, for tokens [B, T, C]."""
    size = x.shape[-1] // heads
    options = options_for(TABLE, stage, x.dtype, size, x.device)
    block = next_power_of_2(size)
    constants = {"H": heads, "D": size, "BLOCK_D": block, "ROWS": options.rows}
    return options, constants | options.launch


def prepare(
    tokens: list[Tensor], residual: list[Tensor], weights: list[Tensor], heads: int
) -> list[Tensor]:
    """Launch: log_decay (float32), key, alpha, beta [B, T, C], and the value with a residual.

    tokens: w, k, v, a. residual: mix and v_first, or nothing. weights: w0, a0, k_k, k_a and, with
    a residual, v0.
    """
    k = tokens[1]
    new = [torch.empty_like(k) for _ in range(4 if residual else 3)]
    new = [torch.empty_like(k, dtype=torch.float32), *new]
    options, constants = launch("keys", k, heads)
    count = k.shape[0] * k.shape[1]
    if k.numel():
        _forward_kernel[(ceil_div(count, options.rows) * heads,)](
            *tokens, *residual or (None, None), *_with(weights, 5),
            *_with(new, 5), count, **constants,
        )  # fmt: skip
    return new


def gradients(
    tokens: list[Tensor],
    residual: list[Tensor],
    weights: list[Tensor],
    r_k: Tensor,
    later: list[Tensor],
) -> tuple[list[Tensor], Tensor]:
    """Launch: gradients of r, w, k, v, a, mix, v_first, and of weights [4 or 5, C] (float32).

    tokens: r, w, k, v, a. later: gradients of bonus [B, T, H] and value from what follows the
    recurrence; of r, log_decay, key, value, alpha, beta from the recurrence.
    """
    k, heads = tokens[2], r_k.shape[0]
    new = [torch.empty_like(k) for _ in range(7 if residual else 5)]
    options, constants = launch("keys_gradients", k, heads)
    count = k.shape[0] * k.shape[1]
    parts = ceil_div(count, options.rows * options.columns)
    partial = k.new_empty(len(weights), parts, k.shape[-1], dtype=torch.float32)
    if k.numel():
        _backward_kernel[(parts * heads,)](
            *tokens, *residual or (None, None), *_with(weights, 5), r_k, *later,
            *_with(new, 7), partial, count, parts, **constants, STEPS=options.columns,
        )  # fmt: skip
    return new, partial.sum(dim=1)


def _with(tensors: list[Tensor], count: int) -> list[Tensor | None]:
    return [*tensors, *[None] * (count - len(tensors))]
