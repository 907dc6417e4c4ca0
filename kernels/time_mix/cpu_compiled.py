"""The time mix between its projections in one pass over memory, compiled, without gradients.

What a token needs is made where it is used, in the first-level cache. Torch reads and writes the
same numbers some twenty times, which costs as much as the recurrence.

Axes: B batch, T time, C width, H heads, N head size, S sequences.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rwkvx_kernels.compiled import in_threads, loop
from rwkvx_kernels.linear.cpu_compiled import add_columns
from rwkvx_kernels.scalars import as_array, exp, narrow, sigmoid, widen
from rwkvx_kernels.wkv7.cpu_compiled import FEW, product, step, step_turned, worth_turning

# Tokens of a head whose vectors are made at once: with the state they fit the first-level cache.
BLOCK = 8


def time_mix_compiled(
    tokens: tuple[Tensor, ...],
    weights: Any,
    scales: tuple[float, float],
    state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `api.time_mix`: `tokens` r, w, k, v, a, g and, with a residual, its two.

    scales: of the sigmoid in log_decay, and eps.
    """
    heads, size = weights.r_k.shape
    v, state = tokens[3], state.clone(memory_format=torch.contiguous_format)
    out = torch.empty(v.shape, dtype=torch.float32 if v.dtype == torch.float16 else v.dtype)
    residual = tokens[6:] or (v[:0], v[:0])
    rows = [_rows(x, size) for x in (*tokens[:6], *residual, out)]
    v0 = weights.a0[:0] if weights.v0 is None else weights.v0
    vectors = [_rows(x.to(state.dtype), size) for x in (*weights[:2], v0, *weights[3:])]
    batch, length = v.shape[:2]
    if cu_seqlens is None:
        ends = np.arange(1, batch + 1) * length
    else:
        ends = cu_seqlens.cpu().numpy()[1:].astype(np.int64)
    units = len(ends) * heads
    arguments = (ends, heads, *scales, *rows, *vectors, state.numpy())
    if batch * length * heads <= FEW:
        _scan(0, units, *arguments)
    else:
        in_threads(_scan, units, *arguments)
    return out.to(v.dtype), state


def _rows(x: Tensor, size: int) -> np.ndarray:
    """[..., C] -> [tokens · H, N]."""
    wide = x.float() if x.dtype == torch.float16 else x
    return as_array(wide.contiguous().view(-1, size))


@loop
def _scan(
    first, last, ends, heads, scale, eps, r, w, k, v, a, g, mix, v_first, out,
    w0, a0, v0, k_k, k_a, r_k, norm_weight, norm_bias, state,
):  # fmt: skip
    """Units first ... last - 1, numbered by sequence and head."""
    size, kind = state.shape[2], state.dtype
    shape = (BLOCK, size)
    r_now, w_now, k_now, v_now = _four(shape, kind)
    a_now, g_now, mix_now, first_now = _four(shape, kind)
    alpha, beta, y, _ = _four(shape, kind)
    u, u_next = np.empty(size, kind), np.empty(size, kind)
    # Heads take turns after each block: what one token has for all of them lies in one page.
    for n in range(first // heads, (last - 1) // heads + 1):
        start, stop = ends[n - 1] if n else 0, ends[n]
        first_head, last_head = max(first - n * heads, 0), min(last - n * heads, heads)
        lanes = worth_turning(state[n, 0], stop - start)
        if lanes:
            _turn(state[n, first_head:last_head])
        for begin in range(start, stop, BLOCK):
            count = min(BLOCK, stop - begin)
            for h in range(first_head, last_head):
                s, row = state[n, h], begin * heads + h
                _load(r, row, heads, count, r_now)
                _load(w, row, heads, count, w_now)
                _load(k, row, heads, count, k_now)
                _load(v, row, heads, count, v_now)
                _load(a, row, heads, count, a_now)
                _load(g, row, heads, count, g_now)
                _decay(w_now, w0[h], scale, count)
                _gate(a_now, a0[h], count)
                if len(v_first):
                    _load(mix, row, heads, count, mix_now)
                    _load(v_first, row, heads, count, first_now)
                    _gate(mix_now, v0[h], count)
                    _lerp(v_now, first_now, mix_now, count)
                keys(k_now, a_now, k_k[h], k_a[h], alpha, beta, count)
                if lanes:
                    u[:] = 0
                    add_columns(s, alpha[0], u, 0)
                else:
                    product(s, alpha[0], u)
                for t in range(count):
                    rows, after = (w_now, beta, k_now, r_now), min(t + 1, count - 1)
                    if lanes:
                        step_turned(s, t, after, *rows, alpha, u, v_now, y, u_next)
                    else:
                        step(s, t, after, *rows, alpha, u, v_now, y, u_next)
                    u[:] = u_next
                # Apart: the steps are one long chain, tokens here go side by side.
                norm(y, norm_weight[h], norm_bias[h], eps, count)
                finish(y, r_now, k_now, v_now, g_now, r_k[h], count)
                _store(y, out, row, heads, count)
        if lanes:
            _turn(state[n, first_head:last_head])


@loop
def _four(shape, kind):
    return (
        np.empty(shape, kind),
        np.empty(shape, kind),
        np.empty(shape, kind),
        np.empty(shape, kind),
    )


@loop
def _turn(states):
    """[H, N, N], each transposed in its place."""
    for h in range(len(states)):
        states[h] = states[h].T.copy()


@loop
def _load(x, row, heads, count, into):
    for t in range(count):
        for j in range(into.shape[1]):
            into[t, j] = widen(x[row + t * heads, j])


@loop
def _store(x, out, row, heads, count):
    for t in range(count):
        for j in range(x.shape[1]):
            out[row + t * heads, j] = narrow(x[t, j], out[row, j])


@loop
def _decay(w, w0, scale, count):
    """w = exp(scale sigmoid(w0 + w))."""
    factor = w.dtype.type(scale)
    for t in range(count):
        for j in range(w.shape[1]):
            w[t, j] = exp(factor * sigmoid(w0[j] + w[t, j]))


@loop
def _gate(x, bias, count):
    """x = sigmoid(bias + x)."""
    for t in range(count):
        for j in range(x.shape[1]):
            x[t, j] = sigmoid(bias[j] + x[t, j])


@loop
def _lerp(x, end, weight, count):
    """x += (end - x) weight."""
    for t in range(count):
        for j in range(x.shape[1]):
            x[t, j] += (end[t, j] - x[t, j]) * weight[t, j]


@loop
def keys(k, a, k_k, k_a, alpha, beta, count):
    """alpha = -kk, beta = kk a, and k becomes the key that is written: rows of [count, N]."""
    one, size = k.dtype.type(1), k.shape[1]
    for t in range(count):
        square = k.dtype.type(0)
        for j in range(size):
            kk = k[t, j] * k_k[j]
            alpha[t, j] = kk
            square += kk * kk
        # As torch.nn.functional.normalize: x / max(|x|, 1e-12).
        scale = one / max(np.sqrt(square), k.dtype.type(1e-12))
        for j in range(size):
            kk = alpha[t, j] * scale
            alpha[t, j] = -kk
            beta[t, j] = kk * a[t, j]
            k[t, j] *= one - k_a[j] + a[t, j] * k_a[j]


@loop
def norm(y, weight, bias, eps, count):
    """Layer norm over one head: a group norm of the whole. Rows of [count, N], in place."""
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
            y[t, i] = (y[t, i] - mean) * scale * weight[i] + bias[i]


@loop
def finish(y, r, k, v, g, r_k, count):
    """y = (y + bonus v) g: rows of [count, N], in place."""
    for t in range(count):
        bonus = y.dtype.type(0)
        for i in range(y.shape[1]):
            bonus += r[t, i] * k[t, i] * r_k[i]
        for i in range(y.shape[1]):
            y[t, i] = (y[t, i] + bonus * v[t, i]) * g[t, i]
