# mypy: allow-untyped-defs, allow-incomplete-defs
"""One token through a run of blocks, compiled: threads meet five times in a block.

Weights are found through a table of addresses, so that a call costs no more for a large model
than for a small one. Axes as in common.py; P places in the table, L blocks.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numba import prange
from torch import Tensor

from rwkvx_kernels.chunk_attention.numba_form import attend_heads
from rwkvx_kernels.linear.numba_products import activate, add_columns, product_rows
from rwkvx_kernels.one_token.common import BlockWeights, Cache
from rwkvx_kernels.time_mix.numba_head import mix_head
from rwkvx_kernels.tools.numba_loops import (
    array_at,
    copy_matrix,
    copy_row,
    loop,
    parallel_loop,
)
from rwkvx_kernels.tools.numba_scalars import as_array, narrow, widen

# Places in the table: the tensors of `BlockWeights` in its order.
LN1, LN2, X_K, KEY, VALUE, KEY_SCALE, VALUE_SCALE = 0, 2, 4, 5, 6, 7, 8
MIXES, MATRICES, SCALES, DOWN, UP, VECTORS, CONV = 9, 15, 19, 23, 27, 31, 39
# Places in a row of sizes; the last four are the ranks of w, a, v, g.
HEADS, INNER, KV, RANKS = range(4)
# Places in a row of caches, 0 for what is not there.
CACHED_K, CACHED_V, MEANS, OLD_CONV, NEW_CONV, ROOM, CHUNK, TAPS, POSITION, TOPK = range(10)
# Of the inputs mixed for r, w, k, v, a, g: what the matrices r, k, v and the factors w, a, v, g
# read.
MATRIX_INPUT, FACTOR_INPUT = (0, 2, 3), (1, 4, 3, 5)


class Table:
    """The addresses of all weights, and sizes."""

    def __init__(self, blocks: list[BlockWeights]) -> None:
        self._blocks = blocks
        self._table = np.array([_addresses(block.tensors()) for block in blocks], np.int64)
        self._sizes = np.array([_sizes(block) for block in blocks], np.int64)
        self._eps = np.array([block.eps for block in blocks], np.float32)
        # Empty: they tell the compiler of which types vectors and matrices are.
        self._vector, self._matrix = (as_array(x.new_empty(0)) for x in blocks[0].channel[:2])

    def read(
        self,
        blocks: range,
        x: Tensor,
        v_first: Tensor,
        shifts: list[tuple[Tensor, Tensor]],
        states: list[Tensor | None],
        caches: list[Cache | None],
        new_shifts: Tensor,
        new_states: list[Tensor | None],
    ) -> None:
        """As `api.OneToken.read`."""
        part = slice(blocks.start, blocks.stop)
        for block, state, cache in zip(self._blocks[part], states, caches, strict=True):
            _check(block, state, cache)
        given = (
            [_addresses(pair) for pair in shifts],
            [_addresses(pair) for pair in zip(states, new_states, strict=True)],
            [_cache_row(cache) for cache in caches],
        )
        if len(blocks):
            _read(
                self._table[part], self._sizes[part], self._eps[part], self._vector, self._matrix,
                x.numpy(), v_first.numpy(), *(np.array(rows, np.int64) for rows in given),
                new_shifts.numpy(), torch.get_num_threads(),
            )  # fmt: skip


def _check(block: BlockWeights, state: Tensor | None, cache: Cache | None) -> None:
    """Nothing else keeps compiled code inside of its arrays."""
    if cache is not None:
        cache.check(block)
    shape = None if block.mixes[0] is None else (1, block.heads, block.size, block.size)
    if (None if state is None else state.shape) != shape:
        found = None if state is None else tuple(state.shape)
        raise ValueError(f"the state of a block must be {shape}, got {found}")


def _sizes(block: BlockWeights) -> list[int]:
    key = block.matrices[1]
    ranks = [0 if x is None else x.shape[1] for x in block.down]
    return [block.heads, len(block.channel[1]), 0 if key is None else len(key), *ranks]


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if x is None else x.data_ptr() for x in tensors]


def _cache_row(cache: Cache | None) -> list[int]:
    if cache is None:
        return [0] * 10
    assert isinstance(cache.position, int)  # on a CPU
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
    table, sizes, eps, vector, matrix, x, v_first, shifts, states, caches, new_shifts, parts
):  # fmt: skip
    width, inner, kv = len(x), sizes[:, INNER].max(), sizes[:, KV].max()
    mixed, projected = np.empty((6, width), np.float32), np.empty((3, width), np.float32)
    raised, gated = np.empty((4, width), np.float32), np.empty(width, np.float32)
    y, hidden = np.empty(width, np.float32), np.empty(inner, np.float32)
    low = np.empty((parts, 4, max(1, sizes[:, RANKS:].max())), np.float32)
    attended = np.empty(width + 2 * kv, np.float32)
    for b in range(len(table)):
        at, ranks, heads = table[b], sizes[b, RANKS:], sizes[b, HEADS]
        if at[MIXES]:
            now = new_shifts[b, 0]
            _layer_norm(x, at, LN1, vector, eps[b, 0], now)
            before = _at(shifts[b, 0], width, vector)
            for m in range(6):
                _mix(now, before, _at(at[MIXES + m], width, vector), mixed[m])
            _project(at, ranks, mixed, projected, low, vector, matrix, parts)
            for part in range(1, parts):
                for m in range(4):
                    for c in range(ranks[m]):
                        low[0, m, c] += low[part, m, c]
            activate(low[0, 0, : ranks[0]], 1)
            activate(low[0, 3, : ranks[3]], 2)
            _heads(
                at, ranks, heads, low[0], projected, raised, v_first, eps[b, 2], states[b], gated,
                vector, parts,
            )  # fmt: skip
        else:
            _layer_norm(x, at, LN1, vector, eps[b, 0], y)
            part_kv = attended[: width + 2 * sizes[b, KV]]
            _project_attention(at, sizes[b, KV], y, part_kv, matrix, parts)
            _attend(at, caches[b], part_kv, vector, width // heads, gated, parts)
        _product(at[MATRICES + 3], at[SCALES + 3], matrix, gated, y, parts)
        for c in range(width):
            x[c] += y[c]
        now, part_hidden = new_shifts[b, 1], hidden[: sizes[b, INNER]]
        _layer_norm(x, at, LN2, vector, eps[b, 1], now)
        _mix(now, _at(shifts[b, 1], width, vector), _at(at[X_K], width, vector), mixed[0])
        _product(at[KEY], at[KEY_SCALE], matrix, mixed[0], part_hidden, parts)
        for f in range(len(part_hidden)):
            part_hidden[f] = max(part_hidden[f], np.float32(0)) ** 2
        _product(at[VALUE], at[VALUE_SCALE], matrix, part_hidden, y, parts)
        for c in range(width):
            x[c] += y[c]


@loop
def _layer_norm(x, at, place, vector, eps, y):
    weight, bias = _at(at[place], len(x), vector), _at(at[place + 1], len(x), vector)
    mean, square, count = np.float32(0), np.float32(0), np.float32(len(x))
    for c in range(len(x)):
        mean += x[c]
    mean /= count
    for c in range(len(x)):
        square += (x[c] - mean) * (x[c] - mean)
    scale = np.float32(1) / np.sqrt(square / count + eps)
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
    at, ranks, heads, low, projected, raised, v_first, eps, states, gated, vector, parts
):  # fmt: skip
    """From the low-rank sums and projections to what the output projection reads.

    states: the addresses of the old state and of the new one.
    """
    width = len(gated)
    size = width // heads
    shape = (heads, size, size)
    old, new = array_at(states[0], shape, gated), array_at(states[1], shape, gated)
    for part in prange(parts):
        first, last = heads * part // parts, heads * (part + 1) // parts
        for m in range(4):
            made = raised[m, first * size : last * size]
            made[:] = 0
            weight = _matrix_at(at[UP + m], ranks[m], width, vector)
            add_columns(weight, low[m, : ranks[m]], made, first * size)
        scratch = np.empty((13, size), np.float32)
        for h in range(first, last):
            copy_matrix(old[h], new[h])
            _one_head(at, h * size, projected, raised, v_first, eps, new[h], scratch, gated, vector)


@loop
def _one_head(at, c0, projected, raised, v_first, eps, s, scratch, gated, vector):
    """The head whose first channel is `c0`: its state and its share of `gated`."""
    c1 = c0 + len(s)
    for m in range(8):
        weight = _at(at[VECTORS + m], c1, vector)[c0:]  # of v0: empty where there is none
        for c in range(len(weight)):
            scratch[m, c] = widen(weight[c])
    first, residual = v_first[c0:c1], at[VECTORS + 2] != 0
    if not residual:
        copy_row(projected[2, c0:c1], first)
    y = gated[c0:c1].reshape((1, len(s)))
    r, k, v = projected[0:1, c0:c1], projected[1:2, c0:c1], projected[2:3, c0:c1]
    w, a, mix, g = raised[0:1, c0:c1], raised[1:2, c0:c1], raised[2:3, c0:c1], raised[3:4, c0:c1]
    mix_head(
        s, False, 1, eps, residual, scratch[:8], r, w, k, v, a, g, mix,
        first.reshape((1, len(s))), scratch[8:9], scratch[9:10], y, scratch[10], scratch[11],
    )  # fmt: skip
