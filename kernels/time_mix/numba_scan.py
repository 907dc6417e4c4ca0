# mypy: allow-untyped-defs, allow-incomplete-defs
"""The time mix between its projections in one pass over memory, compiled, without gradients.

What a token needs is made where it is used, in the first-level cache. Torch reads and writes the
same numbers some twenty times, which costs as much as the recurrence.

Axes: B batch, T time, C width, H heads, D head size.
"""

import numpy as np
import torch
from torch import Tensor

from rwkvx_kernels.dispatch import check_cu_seqlens
from rwkvx_kernels.time_mix.numba_head import mix_head
from rwkvx_kernels.tools.numba_loops import copy_matrix, in_threads, loop
from rwkvx_kernels.tools.numba_scalars import as_array, narrow, widen
from rwkvx_kernels.wkv7.numba_recurrence import FEW, worth_transposing

# Tokens of a head whose vectors are made at once: with the state they fit the first-level cache.
TOKENS = 8


def time_mix_compiled(
    tokens: list[Tensor],
    weights: list[Tensor],
    eps: float,
    state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `api.time_mix`: `tokens` r, w, k, v, a, g and, with a residual, its two; `weights` as
    `TimeMixWeights.tensors`."""
    heads, size = state.shape[1:3]
    v, state = tokens[3], state.detach().clone(memory_format=torch.contiguous_format)
    out = torch.empty(v.shape, dtype=torch.float32 if v.dtype == torch.float16 else v.dtype)
    rows = [_rows(x, size) for x in (*tokens[:6], *(tokens[6:] or (v[:0], v[:0])), out)]
    w0, a0, *others = (x.detach().to(state.dtype).reshape(heads, size) for x in weights)
    v0 = others.pop() if len(tokens) > 6 else a0
    table = torch.stack([w0, a0, v0, *others], dim=1)
    batch, length = v.shape[:2]
    if cu_seqlens is None:
        ends = np.arange(1, batch + 1) * length
    else:
        ends = np.array(check_cu_seqlens(cu_seqlens, batch, length)[1:], np.int64)
    units = len(ends) * heads
    arguments = (ends, heads, eps, *rows, table.numpy(), state.numpy())
    if batch * length * heads <= FEW:
        _scan(0, units, *arguments)
    else:
        in_threads(_scan, units, *arguments)
    return out.to(v.dtype), state


def _rows(x: Tensor, size: int) -> np.ndarray:
    """[..., C] -> [tokens · H, D]."""
    wide = x.float() if x.dtype == torch.float16 else x
    return as_array(wide.contiguous().view(-1, size))


@loop
def _scan(
    first, last, ends, heads, eps, r, w, k, v, a, g, mix, v_first, out, weights, state
):  # fmt: skip
    """Units first ... last - 1, numbered by sequence and head."""
    size, kind, residual = state.shape[2], state.dtype, len(v_first) > 0
    work = np.empty((11, TOKENS, size), kind)
    r_now, w_now, k_now, v_now, a_now, g_now = work[0], work[1], work[2], work[3], work[4], work[5]
    mix_now, first_now, alpha, beta, y = work[6], work[7], work[8], work[9], work[10]
    u, u_next = np.empty(size, kind), np.empty(size, kind)
    # Heads take turns after some tokens: what one token has for all of them lies in one page.
    for n in range(first // heads, (last - 1) // heads + 1):
        start, stop = ends[n - 1] if n else 0, ends[n]
        first_head, last_head = max(first - n * heads, 0), min(last - n * heads, heads)
        transposed = worth_transposing(state[n, 0], stop - start)
        if transposed:
            _transpose(state[n, first_head:last_head])
        for begin in range(start, stop, TOKENS):
            count = min(TOKENS, stop - begin)
            for h in range(first_head, last_head):
                row = begin * heads + h
                _load(r, row, heads, count, r_now)
                _load(w, row, heads, count, w_now)
                _load(k, row, heads, count, k_now)
                _load(v, row, heads, count, v_now)
                _load(a, row, heads, count, a_now)
                _load(g, row, heads, count, g_now)
                if residual:
                    _load(mix, row, heads, count, mix_now)
                    _load(v_first, row, heads, count, first_now)
                mix_head(
                    state[n, h], transposed, count, eps, residual, weights[h], r_now, w_now, k_now,
                    v_now, a_now, g_now, mix_now, first_now, alpha, beta, y, u, u_next,
                )  # fmt: skip
                _store(y, out, row, heads, count)
        if transposed:
            _transpose(state[n, first_head:last_head])


@loop
def _transpose(states):
    """[H, D, D], each transposed in its place."""
    for h in range(len(states)):
        copy_matrix(states[h].T.copy(), states[h])


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
