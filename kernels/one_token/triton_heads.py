# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"
"""A time mix between its projections for one token, in one launch: second low-rank factors, decay,
keys, value residual, the step of the recurrence, group norm, bonus and gate.

Axes: B rows of the batch, H heads, D head size, C = H·D, R rank. Names as in `triton_products.py`.
A program has one head of one row, the state in registers.
"""

import triton
import triton.language as tl
from torch import Tensor

from rwkvx_kernels.one_token.common import BlockWeights
from rwkvx_kernels.one_token.options import TABLE
from rwkvx_kernels.time_mix.triton_keys import SCALE, keys
from rwkvx_kernels.tools.sizes import next_power_of_2
from rwkvx_kernels.tools.triton_options import options_for
from rwkvx_kernels.tools.triton_overlap import overlapping, wait_for_launches
from rwkvx_kernels.tools.triton_tiles import load, normalise, store


@triton.jit
def factor(p_up, o_c, m_c, C: tl.constexpr, R: tl.constexpr, K: tl.constexpr):
    """Some columns of up [R, C], in tiles of K rows, as they are stored."""
    tiles, o_k = (), tl.arange(0, K)[:, None]
    for i in tl.static_range(0, R, K):
        o_r = i + o_k
        b_up = tl.load(p_up + o_r * C + o_c, mask=(o_r < R) & m_c, other=0.0)
        tiles = tiles + (b_up,)  # noqa: RUF005
    return tiles


@triton.jit
def raised(p_low, tiles, o_c, R: tl.constexpr, K: tl.constexpr):
    """Some columns of low [R] · up [R, C]: [1, columns]."""
    o_k = tl.arange(0, K)[:, None]
    b_sum = tl.zeros((K, o_c.shape[1]), tl.float32)
    for i in tl.static_range((R + K - 1) // K):
        o_r = i * K + o_k
        b_sum += load(p_low, o_r, o_r < R) * tiles[i].to(tl.float32)
    return tl.sum(b_sum, axis=0, keep_dims=True)


@triton.jit(do_not_specialize=["batch"])
def _heads_kernel(
    p_read, p_low, p_up_w, p_up_a, p_up_v, p_up_g,
    p_w0, p_a0, p_v0, p_k_k, p_k_a, p_r_k, p_weight, p_bias,
    p_first, p_state, p_now, p_shift, p_y,
    batch, eps, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, R3: tl.constexpr, K: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0)
    i_b, i_h = i_n // H, i_n % H
    C: tl.constexpr = H * D
    o_k, o_v = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_D)[:, None]
    m_k, m_v = o_k < D, o_v < D
    o_state = i_n.to(tl.int64) * (D * D) + o_v * D + o_k
    b_state = tl.load(p_state + o_state, mask=m_v & m_k, other=0.0)
    o_c, o_x = i_h * D + o_k, i_b * C + i_h * D + o_k
    # Weights, and the state of the token before, many launches ago.
    up_w, up_a = factor(p_up_w, o_c, m_k, C, R0, K), factor(p_up_a, o_c, m_k, C, R1, K)
    up_v, up_g = factor(p_up_v, o_c, m_k, C, R2, K), factor(p_up_g, o_c, m_k, C, R3, K)
    b_w0, b_a0 = load(p_w0, o_c, m_k), load(p_a0, o_c, m_k)
    b_k_k, b_k_a, b_r_k = load(p_k_k, o_c, m_k), load(p_k_a, o_c, m_k), load(p_r_k, o_c, m_k)
    b_weight, b_bias = load(p_weight, o_c, m_k), load(p_bias, o_c, m_k)
    if p_v0 is not None:
        b_v0 = load(p_v0, o_c, m_k)
    wait_for_launches(OVERLAP)
    p_low += i_b * (R0 + R1 + R2 + R3)
    b_r, b_k = load(p_read, o_x, m_k), load(p_read + batch * C, o_x, m_k)
    b_v, b_now = load(p_read + 2 * batch * C, o_x, m_k), load(p_now, o_x, m_k)
    b_w, b_a = raised(p_low, up_w, o_c, R0, K), raised(p_low + R0, up_a, o_c, R1, K)
    b_g = raised(p_low + R0 + R1 + R2, up_g, o_c, R3, K)
    if p_v0 is None:
        store(p_first, o_x, b_v, m_k)
    else:
        b_mix = tl.sigmoid(b_v0 + raised(p_low + R0 + R1, up_v, o_c, R2, K))
        b_v += b_mix * (load(p_first, o_x, m_k) - b_v)
    b_a = tl.sigmoid(b_a0 + b_a)
    b_kk, _, b_key = keys(b_k, b_a, b_k_k, b_k_a)
    b_removed = tl.sum(b_state * -b_kk, axis=1, keep_dims=True)
    b_decay = tl.exp(tl.sigmoid(b_w0 + b_w) * SCALE)
    b_state = b_state * b_decay + b_removed * (b_kk * b_a) + tl.trans(b_v) * b_key
    tl.store(p_state + o_state, b_state, mask=m_v & m_k)
    b_y = tl.trans(tl.sum(b_state * b_r, axis=1, keep_dims=True))
    b_y, _ = normalise(b_y, m_k, eps, D)
    b_bonus = tl.sum(b_r * b_key * b_r_k, axis=1, keep_dims=True)
    store(p_y, o_x, (b_y * b_weight + b_bias + b_bonus * b_v) * b_g, m_k)
    store(p_shift, o_x, b_now, m_k)


def mix_heads(
    read: Tensor,
    low: Tensor,
    now: Tensor,
    weights: BlockWeights,
    v_first: Tensor,
    state: Tensor,
    shift: Tensor,
) -> Tensor:
    """Launch: what the output projection reads, [B, C] float32.

    Args:
        read: r, k, v, [3, B, C] float32. low: [B, R of w, a, v, g]. now: the normalised token.
        v_first: [B, C] float32, written by a block without v0. state: [B, H, D, D] float32, moves
            on in place. shift: [B, C], becomes `now`.
    """
    batch, heads, size, _ = state.shape
    options = options_for(TABLE, "heads", weights.ln1[0].dtype, size, low.device)
    y = v_first.new_empty(v_first.shape)
    ranks = [0 if x is None else len(x) for x in weights.up]
    _heads_kernel[(batch * heads,)](
        read, low, *weights.up, *weights.vectors, v_first, state, now, shift, y,
        batch, weights.eps[2], H=heads, D=size, BLOCK_D=next_power_of_2(size),
        **{f"R{i}": n for i, n in enumerate(ranks)}, K=options.columns, **options.launch,
        **overlapping(low.device),
    )  # fmt: skip
    return y
