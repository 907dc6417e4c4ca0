# mypy: allow-untyped-defs, allow-incomplete-defs
"""Attention of each query over its own keys in the cache, compiled: nothing is gathered or sorted.

Fastest for few queries, and for chunks so small that a product for each costs more to set up than
to do. Axes as in torch_form.py.
"""

import numpy as np
import torch
from numba import prange
from torch import Tensor

from rwkvx_kernels.chunk_select.numba_largest import best_chunks
from rwkvx_kernels.tools.numba_loops import in_threads, loop, order_free, parallel_loop, read_ahead
from rwkvx_kernels.tools.numba_scalars import as_array, exp, widen

# So many keys read in all are done before a second thread has begun.
FEW = 4096
# Bytes between the key or value in use and what is asked for.
AHEAD = 4096


def attend_compiled(
    q_NTRD: Tensor, k_NCSD: Tensor, v_NCSD: Tensor, chosen_NTRP: Tensor, offset: int
) -> Tensor:
    """Softmax over the own chunk up to the query and over the chosen chunks.

    Args:
        q_NTRD: queries at positions offset ... offset + T - 1, float32 or float64.
        k_NCSD, v_NCSD: the chunks, of the same dtype, or bfloat16 with float32 queries.
        chosen_NTRP: int64 chunk numbers, -1 for none.

    Returns:
        [N, T, R, D].
    """
    groups, tokens, heads, dim = q_NTRD.shape
    scaled = q_NTRD * dim**-0.5
    output = torch.empty_like(scaled)
    size, slots = k_NCSD.shape[2], chosen_NTRP.shape[-1]
    arrays = [as_array(x) for x in (scaled, k_NCSD, v_NCSD, chosen_NTRP, output)]
    units = groups * tokens * heads
    if units * size * (slots + 1) <= FEW:
        _attend(0, units, offset, *arrays)
    else:
        in_threads(_attend, units, offset, *arrays)
    return output


def attend_one(
    q: Tensor, k: Tensor, v: Tensor, means: Tensor, offset: int, chunk_size: int, topk: int
) -> Tensor:
    """The token at position `offset`, by flat selection: q [B, 1, H, D] -> [B, 1, H, D].

    k, v: [B, G, S, D], means: [B, G, C, D], contiguous, as a cache has them.
    """
    wide = q.to(means.dtype).contiguous()
    output = torch.empty_like(wide)
    arrays = [as_array(x) for x in (wide, k, v, means, output)]
    attend_heads(torch.get_num_threads(), offset, chunk_size, topk, *arrays)
    return output.to(q.dtype)


@loop
def attend_heads(threads, offset, size, topk, q, k, v, means, output):
    """One query at position `offset` of each row and head: q, output [B, 1, H, D] of the dtype of
    `means`; k, v [B, G, S, D], means [B, G, C, D] as in the cache."""
    few = q.shape[0] * q.shape[2] * (size * topk + offset // size) <= FEW
    _attend_heads(1 if few else threads, offset, size, topk, q, k, v, means, output)


@parallel_loop
def _attend_heads(parts, offset, size, topk, q, k, v, means, output):
    batch, _, heads, dim = q.shape
    past, shared = offset // size, heads // k.shape[1]
    slots = min(topk - 1, past)
    shape, scale = (k.shape[2] // size, size, dim), 1 / np.sqrt(dim)
    for part in prange(parts):
        best, chosen = np.empty(slots, q.dtype), np.arange(slots)
        scaled, score = np.empty(dim, q.dtype), np.empty(size * (slots + 1), q.dtype)
        for unit in range(batch * heads * part // parts, batch * heads * (part + 1) // parts):
            b, h = unit // heads, unit % heads
            g = h // shared
            if slots < past:
                best_chunks(q[b, 0, h], means[b, g, :past], best, chosen)
            for d in range(dim):
                scaled[d] = q[b, 0, h, d] * q.dtype.type(scale)
            keys, values = k[b, g].reshape(shape), v[b, g].reshape(shape)
            _one_query(scaled, keys, values, offset, chosen, score, output[b, 0, h])


@loop
def _attend(first, last, offset, q, k, v, chosen, output):
    """Units first ... last - 1, numbered by group, token and head."""
    tokens, heads = q.shape[1:3]
    score = np.empty(k.shape[2] * (chosen.shape[3] + 1), q.dtype)
    for unit in range(first, last):
        n, t, h = unit // (tokens * heads), unit // heads % tokens, unit % heads
        at = offset + t
        _one_query(q[n, t, h], k[n], v[n], at, chosen[n, t, h], score, output[n, t, h])


@loop
def _one_query(query, k, v, position, chosen, score, out):
    """Softmax attention of the scaled query at `position` to its own and the chosen chunks."""
    size = k.shape[1]
    own, within = divmod(position, size)
    count = within + 1
    _score(query, k[own, :count], score)
    for p in range(len(chosen)):
        if chosen[p] >= 0:
            _score(query, k[chosen[p]], score[count:])
            count += size
    _softmax(score[:count])
    out[:] = 0
    _add(score, v[own, : within + 1], out)
    count = within + 1
    for p in range(len(chosen)):
        if chosen[p] >= 0:
            _add(score[count:], v[chosen[p]], out)
            count += size


@loop
def _score(query, keys, score):
    """Products with all keys, four at a time."""
    count, dim, size = keys.shape[0], keys.shape[1], keys.strides[0]
    whole, zero = count // 4 * 4, query.dtype.type(0)
    last, address = count * size - AHEAD, keys.ctypes.data + AHEAD
    for s in range(0, whole, 4):
        if s * size < last:
            read_ahead(address + s * size, 4 * size)
        t0, t1, t2, t3 = zero, zero, zero, zero
        for d in range(dim):
            t0 += query[d] * widen(keys[s, d])
            t1 += query[d] * widen(keys[s + 1, d])
            t2 += query[d] * widen(keys[s + 2, d])
            t3 += query[d] * widen(keys[s + 3, d])
        score[s], score[s + 1], score[s + 2], score[s + 3] = t0, t1, t2, t3
    for s in range(whole, count):
        total = zero
        for d in range(dim):
            total += query[d] * widen(keys[s, d])
        score[s] = total


@order_free
def _largest_of(x):
    top = x[0]
    for s in range(1, len(x)):
        top = max(top, x[s])
    return top


@loop
def _softmax(score):
    top, total = _largest_of(score), score.dtype.type(0)
    for s in range(len(score)):
        score[s] = exp(score[s] - top)
        total += score[s]
    for s in range(len(score)):
        score[s] /= total


@loop
def _add(weight, values, out):
    """out += the weighted sum of all values, four at a time."""
    count, dim, size = values.shape[0], values.shape[1], values.strides[0]
    whole, last, address = count // 4 * 4, count * size - AHEAD, values.ctypes.data + AHEAD
    for s in range(0, whole, 4):
        if s * size < last:
            read_ahead(address + s * size, 4 * size)
        w0, w1, w2, w3 = weight[s], weight[s + 1], weight[s + 2], weight[s + 3]
        for d in range(dim):
            first = w0 * widen(values[s, d]) + w1 * widen(values[s + 1, d])
            out[d] += first + w2 * widen(values[s + 2, d]) + w3 * widen(values[s + 3, d])
    for s in range(whole, count):
        for d in range(dim):
            out[d] += weight[s] * widen(values[s, d])
