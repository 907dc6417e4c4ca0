"""One token through a run of blocks, compiled: threads meet five times in a block.

Weights are found through a table of addresses, so that a call costs no more for a large model
than for a small one. Axes as in api.py; P places in the table.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numba import prange
from torch import Tensor

from rwkvx_kernels.chunk_attention.cpu_compiled import attend_heads
from rwkvx_kernels.compiled import array_at, loop, parallel_loop
from rwkvx_kernels.linear.cpu_compiled import (
    activate,
    add_columns,
    product_rows,
)
from rwkvx_kernels.one_token.api import BlockWeights, Cache
from rwkvx_kernels.scalars import as_array, exp, narrow, sigmoid, widen
from rwkvx_kernels.time_mix.api import LOG_DECAY_SCALE
from rwkvx_kernels.time_mix.cpu_compiled import finish, keys, norm
from rwkvx_kernels.wkv7.cpu_compiled import product, step

SCALE = np.float32(LOG_DECAY_SCALE)
LAYER_NORM_EPS = np.float32(1e-5)
# Places in the table: `BlockWeights` in its order.
LN1, LN2, X_K, KEY, VALUE, KEY_SCALE, VALUE_SCALE = 0, 2, 4, 5, 6, 7, 8
MIXES, MATRICES, SCALES, DOWN, UP, VECTORS, CONV = 9, 15, 19, 23, 27, 31, 39
# Places in a row of caches, 0 for what is not there.
CACHED_K, CACHED_V, MEANS, OLD_CONV, NEW_CONV, ROOM, CHUNK, TAPS, POSITION, TOPK = range(10)
# Of the inputs mixed for r, w, k, v, a, g: what the matrices r, k, v and the factors w, a, v, g
# read.
MATRIX_INPUT, FACTOR_INPUT = (0, 2, 3), (1, 4, 3, 5)


class Table:
    """The addresses of all weights, and sizes."""

    def __init__(self, given: list[BlockWeights | None]) -> None:
        self._blocks = given
        blocks = [x for x in given if x]
        width = len(blocks[0].tensors())
        rows = [[0] * width if x is None else _addresses(x.tensors()) for x in given]
        none = [[0] * 4 for _ in given]
        heads, eps = (
            blocks[0].heads,
            next((x.eps[2] for x in blocks if x.mixes[0] is not None), 0.0),
        )
        self._table = np.array(rows, np.int64)
        ranks = [
            n if b is None else [0 if x is None else x.shape[1] for x in b.down]
            for b, n in zip(given, none)
        ]
        self._ranks = np.array(ranks, np.int64)
        self._inner = len(blocks[0].channel[1])
        attention = [x.matrices[1] for x in blocks if x.mixes[0] is None]
        self._kv = len(attention[0]) if attention and attention[0] is not None else 0
        self._heads, self._eps = heads, np.float32(eps)
        # Empty: they tell the compiler of which types vectors and matrices are.
        self._vector, self._matrix = (as_array(x.new_empty(0)) for x in blocks[0].channel[:2])

    def read(
        self,
        blocks: range,
        tokens: tuple[Tensor, ...],
        shifts: list[tuple[Tensor, Tensor]],
        states: list[Tensor | None],
        caches: list[Cache | None],
        new_shifts: Tensor,
        new_states: Tensor,
    ) -> Tensor:
        """As `api.OneToken.read`."""
        rows = [_addresses(pair) for pair in shifts] or [[0, 0]]
        cached = [_cache_row(cache) for cache in caches] or [[0]]
        projected = torch.empty(tokens[0].numel() + 2 * self._kv)
        _read(
            blocks.start, blocks.stop, self._table, self._ranks, self._inner, self._kv,
            self._heads, self._eps, self._vector, self._matrix, *(x.numpy() for x in tokens),
            np.array(rows, np.int64), np.array(_addresses(states), np.int64),
            np.array(cached, np.int64),
            new_shifts.numpy(), new_states.numpy(), projected.numpy(), torch.get_num_threads(),
        )  # fmt: skip
        return projected


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if x is None else x.data_ptr() for x in tensors]


def _cache_row(cache: Cache | None) -> list[int]:
    if cache is None:
        return [0] * 10
    addresses = _addresses((cache.k, cache.v, cache.means, cache.conv, cache.new_conv))
    room, taps = cache.k.shape[2], 0 if cache.conv is None else cache.conv.shape[1]
    return [*addresses, room, room // cache.means.shape[2], taps, cache.position, cache.topk]


@loop
def _at(address, size, like):
    return array_at(address, (size if address else 0,), like)


@loop
def _matrix_at(address, rows, columns, like):
    return array_at(address, (rows if address else 0, columns), like)


@loop
def _read(
    first, last, table, ranks, inner, kv, heads, eps, vector, matrix, x, v_first, attended, shifts,
    states, caches, new_shifts, new_states, projected_kv, parts,
):  # fmt: skip
    width = len(x)
    size = width // heads
    mixed, projected = np.empty((6, width), np.float32), np.empty((3, width), np.float32)
    raised, gated = np.empty((4, width), np.float32), np.empty(width, np.float32)
    y, hidden = np.empty(width, np.float32), np.empty(inner, np.float32)
    low = np.empty((parts, 4, max(1, ranks.max())), np.float32)
    for b in range(first, last):
        at, i = table[b], b - first
        if at[MIXES]:
            now = new_shifts[i, 0]
            _layer_norm(x, at, LN1, vector, now)
            before = _at(shifts[i, 0], width, vector)
            for m in range(6):
                _mix(now, before, _at(at[MIXES + m], width, vector), mixed[m])
            _project(at, ranks[b], mixed, projected, low, vector, matrix, parts)
            for part in range(1, parts):
                low[0] += low[part]
            activate(low[0, 0, : ranks[b, 0]], 1)
            activate(low[0, 3, : ranks[b, 3]], 2)
            old = _at(states[i], width * size, x).reshape((heads, size, size))
            _heads(
                at, ranks[b], low[0], projected, raised, v_first, eps, old, new_states[i], gated,
                vector, parts,
            )  # fmt: skip
        elif caches[i, CACHED_K]:
            _layer_norm(x, at, LN1, vector, y)
            _project_attention(at, kv, y, projected_kv, matrix, parts)
            _attend(at, caches[i], projected_kv, vector, size, gated, parts)
        else:
            gated[:] = attended
        _product(at[MATRICES + 3], at[SCALES + 3], matrix, gated, y, parts)
        for c in range(width):
            x[c] += y[c]
        now = new_shifts[i, 1]
        _layer_norm(x, at, LN2, vector, now)
        _mix(now, _at(shifts[i, 1], width, vector), _at(at[X_K], width, vector), mixed[0])
        _product(at[KEY], at[KEY_SCALE], matrix, mixed[0], hidden, parts)
        for f in range(inner):
            hidden[f] = max(hidden[f], np.float32(0)) ** 2
        _product(at[VALUE], at[VALUE_SCALE], matrix, hidden, y, parts)
        for c in range(width):
            x[c] += y[c]


@loop
def _layer_norm(x, at, place, vector, y):
    weight, bias = _at(at[place], len(x), vector), _at(at[place + 1], len(x), vector)
    mean, square, count = np.float32(0), np.float32(0), np.float32(len(x))
    for c in range(len(x)):
        mean += x[c]
    mean /= count
    for c in range(len(x)):
        square += (x[c] - mean) * (x[c] - mean)
    scale = np.float32(1) / np.sqrt(square / count + LAYER_NORM_EPS)
    for c in range(len(x)):
        y[c] = (x[c] - mean) * scale * widen(weight[c]) + widen(bias[c])


@loop
def _mix(now, before, weight, mixed):
    for c in range(len(mixed)):
        mixed[c] = now[c] + (widen(before[c]) - now[c]) * widen(weight[c])


@parallel_loop
def _product(address, scales, matrix, x, y, parts):
    for part in prange(parts):
        weight, scale = _matrix_at(address, len(y), len(x), matrix), _at(scales, len(y), x)
        product_rows(weight, scale, x, y, part, parts)


@parallel_loop
def _project_attention(at, kv, x, projected, matrix, parts):
    """Queries, keys and values of an attention block."""
    width = len(x)
    for part in prange(parts):
        for m in range(3):
            start, rows = (0, width) if m == 0 else (width + (m - 1) * kv, kv)
            weight = _matrix_at(at[MATRICES + m], rows, width, matrix)
            scale = _at(at[SCALES + m], rows, x)
            product_rows(weight, scale, x, projected[start : start + rows], part, parts)


@loop
def _attend(at, cache, projected, vector, size, attended, parts):
    """The token's key and value go to their places, and its queries over all."""
    width = len(attended)
    kv, room, position = (len(projected) - width) // 2, cache[ROOM], cache[POSITION]
    groups, chunk = kv // size, cache[CHUNK]
    shape = (1, groups, room, size)
    k, v = array_at(cache[CACHED_K], shape, vector), array_at(cache[CACHED_V], shape, vector)
    means = array_at(cache[MEANS], (1, groups, room // chunk, size), attended)
    if at[CONV]:
        _convolve(at, cache, projected[width : width + kv], vector)
    for g in range(groups):
        for c in range(size):
            at_key = width + g * size + c
            k[0, g, position, c] = narrow(projected[at_key], k[0, g, position, c])
            v[0, g, position, c] = narrow(projected[at_key + kv], v[0, g, position, c])
    heads = (1, 1, width // size, size)
    queries, output = projected[:width].reshape(heads), attended.reshape(heads)
    attend_heads(parts, position, chunk, cache[TOPK], queries, k, v, means, output)


@loop
def _convolve(at, cache, key, vector):
    """A key's causal convolution with the keys before it, which move up."""
    taps = cache[TAPS]
    old = array_at(cache[OLD_CONV], (taps, len(key)), vector)
    new = array_at(cache[NEW_CONV], (taps, len(key)), vector)
    weight = array_at(at[CONV], (taps + 1, len(key)), vector)
    for c in range(len(key)):
        total = key[c] * widen(weight[taps, c])
        for tap in range(taps):
            total += widen(old[tap, c]) * widen(weight[tap, c])
            new[tap, c] = old[tap + 1, c] if tap + 1 < taps else narrow(key[c], old[tap, c])
        key[c] = total


@parallel_loop
def _project(at, ranks, mixed, projected, low, vector, matrix, parts):
    """r, k, v, and each part's share of the sums that the low-rank factors make."""
    width = mixed.shape[1]
    for part in prange(parts):
        for m in range(3):
            weight = _matrix_at(at[MATRICES + m], width, width, matrix)
            scale = _at(at[SCALES + m], width, projected)
            product_rows(weight, scale, mixed[MATRIX_INPUT[m]], projected[m], part, parts)
        first, last = width * part // parts, width * (part + 1) // parts
        for m in range(4):
            made = low[part, m, : ranks[m]]
            made[:] = 0
            weight = _matrix_at(at[DOWN + m], width, ranks[m], vector)
            add_columns(weight[first:last], mixed[FACTOR_INPUT[m], first:last], made, 0)


@parallel_loop
def _heads(
    at, ranks, low, projected, raised, v_first, eps, old, new, gated, vector, parts
):  # fmt: skip
    """From the low-rank sums and projections to what the output projection reads."""
    heads, size = new.shape[:2]
    for part in prange(parts):
        first, last = heads * part // parts, heads * (part + 1) // parts
        for m in range(4):
            made = raised[m, first * size : last * size]
            made[:] = 0
            weight = _matrix_at(at[UP + m], ranks[m], heads * size, vector)
            add_columns(weight, low[m, : ranks[m]], made, first * size)
        scratch = np.empty((16, size), np.float32)
        for h in range(first, last):
            new[h] = old[h]
            _one_head(at, h * size, projected, raised, v_first, eps, new[h], scratch, gated, vector)


@loop
def _one_head(at, c0, projected, raised, v_first, eps, s, scratch, gated, vector):
    """The head whose first channel is `c0`: its state and its share of `gated`."""
    size, c1 = len(s), c0 + len(s)
    for m in range(8):
        weight = _at(at[VECTORS + m], c1, vector)[c0:]  # of w0, a0, v0: empty where there is none
        for c in range(len(weight)):
            scratch[m, c] = widen(weight[c])
    w0, a0, v0, k_k, k_a = scratch[0], scratch[1], scratch[2], scratch[3], scratch[4]
    r_k, norm_weight, norm_bias = scratch[5], scratch[6], scratch[7]
    decay, a, y = scratch[8:9], scratch[9:10], scratch[10:11]
    alpha, beta, u, unused = scratch[11:12], scratch[12:13], scratch[13], scratch[14]
    r, k, v = (
        _piece(projected[0], c0, c1), _piece(projected[1], c0, c1), _piece(projected[2], c0, c1)
    )  # fmt: skip
    w_up, a_up, v_up, g = raised[0, c0:c1], raised[1, c0:c1], raised[2, c0:c1], raised[3, c0:c1]
    for c in range(size):
        decay[0, c] = exp(SCALE * sigmoid(w0[c] + w_up[c]))
        a[0, c] = sigmoid(a0[c] + a_up[c])
    first = v_first[c0:c1]
    if at[VECTORS + 2]:
        for c in range(size):
            v[0, c] += (first[c] - v[0, c]) * sigmoid(v0[c] + v_up[c])
    else:
        first[:] = v[0]
    keys(k, a, k_k, k_a, alpha, beta, 1)
    product(s, alpha[0], u)
    step(s, 0, 0, decay, beta, k, r, alpha, u, v, y, unused)
    norm(y, norm_weight, norm_bias, eps, 1)
    finish(y, r, k, v, g.reshape((1, size)), r_k, 1)
    gated[c0:c1] = y[0]


@loop
def _piece(x, first, last):
    """[1, elements]."""
    return x[first:last].reshape((1, last - first))
