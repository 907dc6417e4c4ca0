"""The time mix between its projections in one pass over memory, compiled, without gradients.

What a token needs is made where it is used, in the first-level cache. Torch reads and writes the
same numbers some twenty times, which costs as much as the recurrence.

Axes: B batch, T time, C width, H heads, N head size, S sequences.
"""

import numpy as np
import torch
from torch import Tensor

from rwkvx_kernels.compiled import in_threads, loop
from rwkvx_kernels.wkv7.cpu_compiled import FEW, product, step, step_turned, turn


def time_mix_compiled(
    r: Tensor,
    log_decay: Tensor,
    v: Tensor,
    a: Tensor,
    k: Tensor,
    g: Tensor,
    k_k: Tensor,
    k_a: Tensor,
    r_k: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `api.time_mix` after the gates."""
    heads, size = r_k.shape
    state, out = state.clone(), torch.empty(v.shape, dtype=state.dtype)
    tokens = [_rows(x, size) for x in (r, _decay(log_decay, state.dtype), k, v, a, g, out)]
    weights = [_rows(x, size) for x in (k_k, k_a, r_k, norm_weight, norm_bias)]
    batch, length = v.shape[:2]
    if cu_seqlens is None:
        ends = np.arange(1, batch + 1) * length
    else:
        ends = cu_seqlens.cpu().numpy()[1:].astype(np.int64)
    units = len(ends) * heads
    arguments = (ends, heads, eps, *tokens, *weights, state.numpy())
    if batch * length * heads <= FEW:
        _scan(0, units, *arguments)
    else:
        in_threads(_scan, units, *arguments)
    return out.to(v.dtype), state


def _decay(log_decay: Tensor, dtype: torch.dtype) -> Tensor:
    return log_decay.detach().to(dtype).exp()


def _rows(x: Tensor, size: int) -> np.ndarray:
    """[..., C] -> [tokens · H, N], float32 unless float64."""
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    rows: np.ndarray = x.contiguous().view(-1, size).numpy()
    return rows


@loop
def _scan(
    first, last, ends, heads, eps, r, decay, k, v, a, g, out,
    k_k, k_a, r_k, norm_weight, norm_bias, state,
):  # fmt: skip
    """Units first ... last - 1, numbered by sequence and head."""
    size = r.shape[1]
    now, then = np.empty((3, size), r.dtype), np.empty((3, size), r.dtype)
    u, u_next, y = np.empty(size, r.dtype), np.empty(size, r.dtype), np.empty(size, r.dtype)
    for unit in range(first, last):
        n, h = unit // heads, unit % heads
        s, stop = state[n, h], ends[n]
        start = ends[n - 1] if n else 0
        if start == stop:
            continue
        row = start * heads + h
        keys(k[row], a[row], k_k[h], k_a[h], now)
        product(s, now[0], u)
        lanes, turned = turn(s, stop - start)
        for t in range(start, stop):
            row = t * heads + h
            after = row + heads if t + 1 < stop else row
            keys(k[after], a[after], k_k[h], k_a[h], then)
            vectors = decay[row], now[1], now[2], r[row], then[0], u, v[row], y, u_next
            if lanes:
                step_turned(turned, *vectors)
            else:
                step(s, *vectors)
            norm(y, norm_weight[h], norm_bias[h], eps)
            finish(y, r[row], now[2], v[row], g[row], r_k[h], out[row])
            u[:] = u_next
            now[:] = then
        if lanes:
            s[:] = turned.T


@loop
def keys(k, a, k_k, k_a, made):
    """alpha = -kk, beta = kk a, and the key that is written: made [3, N]."""
    square = k.dtype.type(0)
    for j in range(len(k)):
        kk = k[j] * k_k[j]
        made[0, j] = kk
        square += kk * kk
    # As torch.nn.functional.normalize: x / max(|x|, 1e-12).
    scale = k.dtype.type(1) / max(np.sqrt(square), k.dtype.type(1e-12))
    for j in range(len(k)):
        kk = made[0, j] * scale
        made[0, j] = -kk
        made[1, j] = kk * a[j]
        made[2, j] = k[j] * (1 - k_a[j] + a[j] * k_a[j])


@loop
def norm(y, weight, bias, eps):
    """Layer norm over one head: a group norm of the whole."""
    mean, square, count = y.dtype.type(0), y.dtype.type(0), y.dtype.type(len(y))
    for i in range(len(y)):
        mean += y[i]
    mean /= count
    for i in range(len(y)):
        square += (y[i] - mean) * (y[i] - mean)
    scale = y.dtype.type(1) / np.sqrt(square / count + y.dtype.type(eps))
    for i in range(len(y)):
        y[i] = (y[i] - mean) * scale * weight[i] + bias[i]


@loop
def finish(y, r, k, v, g, r_k, out):
    """Bonus and gate."""
    bonus = y.dtype.type(0)
    for i in range(len(y)):
        bonus += r[i] * k[i] * r_k[i]
    for i in range(len(y)):
        out[i] = (y[i] + bonus * v[i]) * g[i]
