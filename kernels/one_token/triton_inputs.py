# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"
"""What a product of one token reads: the token, normalised and mixed with the one before it.

Axes and names as in `triton_products.py`.
"""

import triton
import triton.language as tl

from rwkvx_kernels.tools.triton_tiles import load


@triton.jit
def pick(i, p_0, p_1, p_2, p_3):
    """The i-th of some pointers; those that never count may be None."""
    p_x = p_0
    if p_1 is not None:
        if i == 1:
            p_x = p_1
        if p_2 is not None:
            if i == 2:
                p_x = p_2
            if p_3 is not None:  # noqa: SIM102 (the outer one is decided when compiled)
                if i == 3:
                    p_x = p_3
    return p_x


@triton.jit
def statistics(p_x, o_b, m_b, eps, C: tl.constexpr, K: tl.constexpr):
    """Mean and one over the deviation of rows, [B, 1]."""
    o_k = tl.arange(0, K)[None, :]
    if C <= K:
        m_x = m_b & (o_k < C)
        b_x = load(p_x, o_b * C + o_k, m_x)
        b_mean = tl.sum(b_x, axis=1, keep_dims=True) / C
        b_x = tl.where(m_x, b_x - b_mean, 0.0)
        b_square = tl.sum(b_x * b_x, axis=1, keep_dims=True)
    else:
        b_mean, b_square = tl.zeros_like(o_b).to(tl.float32), tl.zeros_like(o_b).to(tl.float32)
        for i in range(0, C, K):
            b_x = load(p_x, o_b * C + i + o_k, m_b & (i + o_k < C))
            b_mean += tl.sum(b_x, axis=1, keep_dims=True)
        b_mean = b_mean / C
        for i in range(0, C, K):
            m_x = m_b & (i + o_k < C)
            b_x = tl.where(m_x, load(p_x, o_b * C + i + o_k, m_x) - b_mean, 0.0)
            b_square += tl.sum(b_x * b_x, axis=1, keep_dims=True)
    return b_mean, 1.0 / tl.sqrt(b_square / C + eps)


@triton.jit
def read(
    p_x, p_before, p_weight, p_bias, p_mix, b_mean, b_inverse, o_b, o_i, m_x, INPUTS: tl.constexpr
):
    """Inputs: as they are, or normalised and mixed with those of the token before."""
    b_x = load(p_x, o_b * INPUTS + o_i, m_x)
    if p_weight is not None:
        b_x = (b_x - b_mean) * b_inverse * load(p_weight, o_i, o_i < INPUTS) + load(
            p_bias, o_i, o_i < INPUTS
        )
        if p_mix is not None:
            b_x += (load(p_before, o_b * INPUTS + o_i, m_x) - b_x) * load(p_mix, o_i, o_i < INPUTS)
        b_x = tl.where(m_x, b_x, 0.0)
    return b_x


@triton.jit
def beside(
    p_before, p_weight, p_bias, p_mix, o_b, o_first, m_b,
    TILES: tl.constexpr, K: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """What `read` reads beside the inputs, of some tiles of K: norm, mix, token before (zeros where
    nothing is mixed). None of it was written by the launch before."""
    weights, biases, mixes, befores = (), (), (), ()
    for j in tl.static_range(TILES):
        o_i = j * K + o_first
        m_i = o_i < INPUTS
        b_weight, b_bias = load(p_weight, o_i, m_i), load(p_bias, o_i, m_i)
        b_mix, b_before = tl.zeros_like(b_weight), tl.zeros_like(b_weight)
        if p_mix is not None:
            b_mix = load(p_mix, o_i, m_i)
            b_before = load(p_before, o_b * INPUTS + o_i, m_b & m_i)
        weights = weights + (b_weight,)  # noqa: RUF005
        biases = biases + (b_bias,)  # noqa: RUF005
        mixes = mixes + (b_mix,)  # noqa: RUF005
        befores = befores + (b_before,)  # noqa: RUF005
    return weights, biases, mixes, befores


@triton.jit
def mixed(b_x, b_mean, b_inverse, b_weight, b_bias, b_mix, b_before):
    """As `read`, of tiles that are there."""
    b_x = (b_x - b_mean) * b_inverse * b_weight + b_bias
    return b_x + (b_before - b_x) * b_mix


@triton.jit
def exact(b_w):
    """int8 as bfloat16, which holds it; float16 as float32, which the products know."""
    if b_w.dtype == tl.int8:
        return b_w.to(tl.float32).to(tl.bfloat16)
    elif b_w.dtype == tl.float16:
        return b_w.to(tl.float32)
    else:
        return b_w


@triton.jit
def tanh(b_x):
    """(1 - t) / (1 + t) with t = exp(-2 |x|), which near 0 would lose digits."""
    b_t = tl.exp(-2.0 * tl.abs(b_x))
    b_far = (1.0 - b_t) / (1.0 + b_t)
    b_2 = b_x * b_x
    b_near = b_x * (1.0 + b_2 * (-1 / 3 + b_2 * (2 / 15 - b_2 * (17 / 315))))
    return tl.where(tl.abs(b_x) < 0.1, b_near, tl.where(b_x < 0, -b_far, b_far))
