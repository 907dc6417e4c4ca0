# mypy: allow-untyped-defs, allow-incomplete-defs
"""The time mix of one head for a few tokens, compiled: the step that every compiled form does.

Arrays of [tokens, D] are worked on in place, in float32 or float64. D head size.
"""

import numpy as np

from rwkvx_kernels.linear.numba_products import add_columns
from rwkvx_kernels.time_mix.common import LOG_DECAY_SCALE
from rwkvx_kernels.tools.numba_loops import copy_row, loop
from rwkvx_kernels.tools.numba_scalars import exp, sigmoid
from rwkvx_kernels.wkv7.numba_recurrence import product, step, step_transposed

# Rows of the weights: `TimeMixWeights` in its order.
W0, A0, V0, K_K, K_A, R_K, NORM_WEIGHT, NORM_BIAS = range(8)


@loop
def mix_head(
    s, transposed, count, eps, residual, weights, r, w, k, v, a, g, mix, v_first,
    alpha, beta, y, u, u_next,
):  # fmt: skip
    """From what the projections give to what the output projection reads, in `y`.

    Args:
        s: [V, K], the state, which moves on; S^T if `transposed`.
        count: of the rows so many are tokens. residual: whether `mix` and `v_first` are there.
        weights: [8, D]. r ... v_first: [rows, D], overwritten.
        alpha, beta: [rows, D]; u, u_next: [D]; scratch memory.
    """
    _decay(w, weights, count)
    _gate(a, weights, A0, count)
    if residual:
        _gate(mix, weights, V0, count)
        _lerp(v, v_first, mix, count)
    _keys(k, a, weights, alpha, beta, count)
    if transposed:
        u[:] = 0
        add_columns(s, alpha[0], u, 0)
    else:
        product(s, alpha[0], u)
    for t in range(count):
        after = min(t + 1, count - 1)
        if transposed:
            step_transposed(s, t, after, w, beta, k, r, alpha, u, v, y, u_next)
        else:
            step(s, t, after, w, beta, k, r, alpha, u, v, y, u_next)
        copy_row(u_next, u)
    # Apart: the steps are one long chain, tokens here go side by side.
    _norm(y, weights, eps, count)
    _finish(y, r, k, v, g, weights, count)


@loop
def _decay(w, weights, count):
    """w = exp(log_decay), log_decay as `LOG_DECAY_SCALE` says."""
    factor = w.dtype.type(LOG_DECAY_SCALE)
    for t in range(count):
        for j in range(w.shape[1]):
            w[t, j] = exp(factor * sigmoid(weights[W0, j] + w[t, j]))


@loop
def _gate(x, weights, bias, count):
    """x = sigmoid(bias + x), the bias one of the weights."""
    for t in range(count):
        for j in range(x.shape[1]):
            x[t, j] = sigmoid(weights[bias, j] + x[t, j])


@loop
def _lerp(x, end, weight, count):
    """x += (end - x) weight."""
    for t in range(count):
        for j in range(x.shape[1]):
            x[t, j] += (end[t, j] - x[t, j]) * weight[t, j]


@loop
def _keys(k, a, weights, alpha, beta, count):
    """alpha = -kk, beta = kk a, and k becomes the key that is written."""
    one, size = k.dtype.type(1), k.shape[1]
    for t in range(count):
        square = k.dtype.type(0)
        for j in range(size):
            kk = k[t, j] * weights[K_K, j]
            alpha[t, j] = kk
            square += kk * kk
        # As torch.nn.functional.normalize: x / max(|x|, 1e-12).
        scale = one / max(np.sqrt(square), k.dtype.type(1e-12))
        for j in range(size):
            kk = alpha[t, j] * scale
            alpha[t, j] = -kk
            beta[t, j] = kk * a[t, j]
            k[t, j] *= one - weights[K_A, j] + a[t, j] * weights[K_A, j]


@loop
def _norm(y, weights, eps, count):
    """Layer norm over one head: a group norm of the whole."""
    one, size = y.dtype.type(1), y.dtype.type(y.shape[1])
    for t in range(count):
        mean, square = y.dtype.type(0), y.dtype.type(0)
        for i in range(y.shape[1]):
            mean += y[t, i]
        mean /= size
        for i in range(y.shape[1]):
            square += (y[t, i] - mean) * (y[t, i] - mean)
        scale = one / np.sqrt(square / size + y.dtype.type(eps))
        for i in range(y.shape[1]):
            y[t, i] = (y[t, i] - mean) * scale * weights[NORM_WEIGHT, i] + weights[NORM_BIAS, i]


@loop
def _finish(y, r, k, v, g, weights, count):
    """y = (y + bonus v) g."""
    for t in range(count):
        bonus = y.dtype.type(0)
        for i in range(y.shape[1]):
            bonus += r[t, i] * k[t, i] * weights[R_K, i]
        for i in range(y.shape[1]):
            y[t, i] = (y[t, i] + bonus * v[t, i]) * g[t, i]
