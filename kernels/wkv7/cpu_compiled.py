"""The recurrence of WKV7 itself, compiled: the fastest form on a CPU where no gradient is needed.

Axes: B batch, T time, H heads, K key channels, V value channels; N sequences.
"""

import numpy as np
import torch
from torch import Tensor

from rwkvx_kernels.compiled import in_threads, loop

# So many tokens times heads are done before a second thread has woken up.
FEW = 64


def wkv7_compiled(
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    beta: Tensor,
    state_NHVK: Tensor,
    *,
    lengths: list[int],
) -> tuple[Tensor, Tensor]:
    """Sequences of `lengths` tokens laid one after the other in [B, T], on the CPU.

    Arguments and results as in `cpu.wkv7_cpu`; no gradients.
    """
    y, state = torch.empty(v.shape, dtype=v.dtype), state_NHVK.clone()
    rows = [x.flatten(0, 1).contiguous() for x in (r, log_decay.exp(), k, v, alpha, beta)]
    arrays = [x.detach().numpy() for x in (*rows, state.contiguous(), y.flatten(0, 1))]
    ends = np.cumsum(np.asarray(lengths, dtype=np.int64))
    units = len(lengths) * v.shape[2]
    if v.shape[0] * v.shape[1] * v.shape[2] <= FEW:
        _scan(0, units, ends, *arrays)
    else:
        in_threads(_scan, units, ends, *arrays)
    return y, state


@loop
def _scan(first, last, ends, r, decay, k, v, alpha, beta, state, y):
    """Units first ... last - 1, numbered by sequence and head: u_t = S_{t-1} alpha_t is at hand."""
    heads, values = state.shape[1:3]
    u, u_next = np.empty(values, y.dtype), np.empty(values, y.dtype)
    for unit in range(first, last):
        n, h = unit // heads, unit % heads
        s, stop = state[n, h], ends[n]
        start = ends[n - 1] if n else 0
        u[:] = 0
        for i in range(values if start < stop else 0):
            for j in range(s.shape[1]):
                u[i] += s[i, j] * alpha[start, h, j]
        for t in range(start, stop):
            after = alpha[min(t + 1, stop - 1), h]
            step(s, decay[t, h], beta[t, h], k[t, h], r[t, h], after, u, v[t, h], y[t, h], u_next)
            u[:] = u_next


@loop
def step(s, decay, beta, k, r, after, u, v, y, u_next):
    """S_t from S_{t-1}, in place; y_t = S_t r_t and S_t alpha_{t+1}, two rows of S at a time."""
    zero = s.dtype.type(0)
    for i in range(0, s.shape[0], 2):
        m = min(i + 1, s.shape[0] - 1)  # an odd last row goes with itself
        u0, u1, v0, v1 = u[i], u[m], v[i], v[m]
        y0, y1, next0, next1 = zero, zero, zero, zero
        for j in range(s.shape[1]):
            s0 = s[i, j] * decay[j] + u0 * beta[j] + v0 * k[j]
            s1 = s[m, j] * decay[j] + u1 * beta[j] + v1 * k[j]
            s[i, j], s[m, j] = s0, s1
            y0 += s0 * r[j]
            y1 += s1 * r[j]
            next0 += s0 * after[j]
            next1 += s1 * after[j]
        y[i], y[m], u_next[i], u_next[m] = y0, y1, next0, next1
