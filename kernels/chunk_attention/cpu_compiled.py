"""Attention of each query over its own keys in the cache, compiled: nothing is gathered or sorted.

Fastest for few queries, and for chunks so small that a product for each costs more to set up than
to do. Axes as in cpu.py.
"""

import numpy as np
import torch
from torch import Tensor

from rwkvx_kernels.compiled import in_threads, loop

# So many keys read in all are done before a second thread has woken up.
FEW = 4096


def attend_compiled(
    q_NTRD: Tensor, k_NCSD: Tensor, v_NCSD: Tensor, chosen_NTRP: Tensor, offset: int
) -> Tensor:
    """Softmax over the own chunk up to the query and over the chosen chunks.

    Args:
        q_NTRD: scaled queries at positions offset ... offset + T - 1, float32 or float64.
        k_NCSD, v_NCSD: the chunks, of the same dtype.
        chosen_NTRP: int64 chunk numbers, -1 for none.

    Returns:
        [N, T, R, D].
    """
    output = torch.empty_like(q_NTRD)
    groups, tokens, heads, _ = q_NTRD.shape
    size, slots = k_NCSD.shape[2], chosen_NTRP.shape[-1]
    arrays = [x.detach().numpy() for x in (q_NTRD, k_NCSD, v_NCSD, chosen_NTRP, output)]
    units = groups * tokens * heads
    if units * size * (slots + 1) <= FEW:
        _attend(0, units, offset, *arrays)
    else:
        in_threads(_attend, units, offset, *arrays)
    return output


@loop
def _attend(first, last, offset, q, k, v, chosen, output):
    """Units first ... last - 1, numbered by group, token and head."""
    tokens, heads, dim = q.shape[1:]
    size, slots = k.shape[2], chosen.shape[3]
    score = np.empty(size * (slots + 1), q.dtype)
    for unit in range(first, last):
        n, t, h = unit // (tokens * heads), unit // heads % tokens, unit % heads
        own, within = divmod(offset + t, size)
        query, count = q[n, t, h], within + 1
        _score(query, k[n, own, :count], score)
        for p in range(slots):
            if chosen[n, t, h, p] >= 0:
                _score(query, k[n, chosen[n, t, h, p]], score[count:])
                count += size
        _softmax(score[:count])
        out = output[n, t, h]
        out[:] = 0
        _add(score, v[n, own, : within + 1], out)
        count = within + 1
        for p in range(slots):
            if chosen[n, t, h, p] >= 0:
                _add(score[count:], v[n, chosen[n, t, h, p]], out)
                count += size


@loop
def _score(query, keys, score):
    for s in range(keys.shape[0]):
        total = query.dtype.type(0)
        for d in range(keys.shape[1]):
            total += query[d] * keys[s, d]
        score[s] = total


@loop
def _softmax(score):
    top, total = score[0], score.dtype.type(0)
    for s in range(1, len(score)):
        top = max(top, score[s])
    for s in range(len(score)):
        score[s] = np.exp(score[s] - top)
        total += score[s]
    for s in range(len(score)):
        score[s] /= total


@loop
def _add(weight, values, out):
    for s in range(values.shape[0]):
        for d in range(values.shape[1]):
            out[d] += weight[s] * values[s, d]
