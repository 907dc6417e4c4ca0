# mypy: allow-untyped-defs, allow-incomplete-defs
"""The recurrence of WKV7 itself, compiled: the fastest form on a CPU.

Axes: B batch, of states: sequences; T time, H heads, K key channels, V value channels.
"""

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from rwkvx_kernels.tools.numba_loops import copy_matrix, copy_row, in_threads, loop
from rwkvx_kernels.tools.numba_vectors import (
    add_product,
    load_lanes,
    row_pointer,
    splat,
    store_lanes,
)

# So many tokens times heads are done before a second thread has woken up.
FEW = 64
# Value channels that go through a step together, one to a lane of a vector.
LANES = 16
# So many tokens are worth transposing a state and back.
WORTH_TRANSPOSING = 8


def wkv7_compiled(
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    beta: Tensor,
    state_BHVK: Tensor,
    *,
    lengths: list[int],
) -> tuple[Tensor, Tensor]:
    """Sequences of `lengths` tokens laid one after the other in [B, T], on the CPU.

    Arguments and results as in `torch_form.wkv7_torch`; no gradients (see `numba_gradients.py`).
    """
    inputs = (r, log_decay, k, v, alpha, beta, state_BHVK)
    y, state, _, _ = run(inputs, Pieces(lengths, 0))
    return y, state


class Pieces:
    """Where sequences end, and which of their states are stored.

    Args:
        size: tokens between two stored states, 0 for none.

    Attributes:
        ends: [sequences], one after the last token; before: [sequences], pieces of all sequences
            before; count: of all pieces.
    """

    def __init__(self, lengths: list[int], size: int) -> None:
        self.size = size
        self.ends = np.cumsum(np.asarray(lengths, dtype=np.int64))
        pieces = [-(-n // size) if size else 0 for n in lengths]
        self.before = np.cumsum(np.asarray([0, *pieces], dtype=np.int64))
        self.count = sum(pieces)


def run(
    inputs: tuple[Tensor, ...], pieces: Pieces
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """y, the final states, the inputs as contiguous rows (decays in place of their logarithms),
    and what gradients need beside these: states before each piece [pieces, H, V, K], and u."""
    r, log_decay, k, v, alpha, beta, state_BHVK = (x.detach() for x in inputs)
    heads, values, keys = state_BHVK.shape[1:]
    y = torch.empty(v.shape, dtype=v.dtype)
    state = state_BHVK.clone(memory_format=torch.contiguous_format)
    rows = [x.flatten(0, 2).contiguous() for x in (r, log_decay.exp(), k, v, alpha, beta)]
    saved = state.new_empty(pieces.count, heads, values, keys)
    u = torch.empty_like(rows[3] if pieces.size else rows[3][:0])
    arrays = [x.numpy() for x in (*rows, state, y.flatten(0, 2), saved, u)]
    units = len(pieces.ends) * heads
    bounds = (pieces.ends, pieces.before, pieces.size)
    if v.shape[0] * v.shape[1] * heads <= FEW:
        _scan(0, units, *bounds, *arrays)
    else:
        in_threads(_scan, units, *bounds, *arrays)
    return y, state, rows, [saved, u]


@loop
def _scan(first, last, ends, pieces, size, r, decay, k, v, alpha, beta, state, y, saved, us):
    """Units first ... last - 1, numbered by sequence and head: u_t = S_{t-1} alpha_t is at hand."""
    heads, values = state.shape[1:3]
    u, u_next = np.empty(values, y.dtype), np.empty(values, y.dtype)
    for unit in range(first, last):
        n, h = unit // heads, unit % heads
        s, stop = state[n, h], ends[n]
        start = ends[n - 1] if n else 0
        if start == stop:
            continue
        product(s, alpha[start * heads + h], u)
        lanes = worth_transposing(s, stop - start)
        transposed = (s.T if lanes else s[:0].T).copy()
        for t in range(start, stop):
            row, after = t * heads + h, min(t + 1, stop - 1) * heads + h
            if size:
                copy_row(u, us[row])
                done = t - start
                if done % size == 0:
                    copy_matrix(transposed.T if lanes else s, saved[pieces[n] + done // size, h])
            if lanes:
                step_transposed(transposed, row, after, decay, beta, k, r, alpha, u, v, y, u_next)
            else:
                step(s, row, after, decay, beta, k, r, alpha, u, v, y, u_next)
            copy_row(u_next, u)
        if lanes:
            copy_matrix(transposed.T, s)


@loop
def product(s, x, y):
    """y = S x."""
    y[:] = 0
    for i in range(s.shape[0]):
        for j in range(s.shape[1]):
            y[i] += s[i, j] * x[j]


@loop
def worth_transposing(s, tokens):
    """Whether `step_transposed` can do so many tokens and pays for transposing S and back."""
    return tokens >= WORTH_TRANSPOSING and s.shape[0] % LANES == 0 and s.shape[1] % 2 == 0


@loop
def step(s, t, after, decay, beta, k, r, alpha, u, v, y, u_next):
    """S_t from S_{t-1}, in place; y_t = S_t r_t and S_t alpha_{after}, two rows of S at a time.

    Arrays of rows with a row's number, not views: counting the references to these takes longer.
    """
    zero = s.dtype.type(0)
    for i in range(0, s.shape[0], 2):
        m = min(i + 1, s.shape[0] - 1)  # an odd last row goes with itself
        u0, u1, v0, v1 = u[i], u[m], v[t, i], v[t, m]
        y0, y1, next0, next1 = zero, zero, zero, zero
        for j in range(s.shape[1]):
            s0 = s[i, j] * decay[t, j] + u0 * beta[t, j] + v0 * k[t, j]
            s1 = s[m, j] * decay[t, j] + u1 * beta[t, j] + v1 * k[t, j]
            s[i, j], s[m, j] = s0, s1
            y0 += s0 * r[t, j]
            y1 += s1 * r[t, j]
            next0 += s0 * alpha[after, j]
            next1 += s1 * alpha[after, j]
        y[t, i], y[t, m], u_next[i], u_next[m] = y0, y1, next0, next1


@loop
def step_transposed(transposed, t, after, decay, beta, k, r, alpha, u, v, y, u_next):
    """As `step`, of S^T [K, V]: sums run along its rows, never across lanes."""
    many = len(u) // (2 * LANES) * (2 * LANES)
    for i in range(0, many, 2 * LANES):
        _step_many(transposed, t, after, decay, beta, k, r, alpha, u, v, y, u_next, i)
    if many < len(u):
        _step_lanes(transposed, t, after, decay, beta, k, r, alpha, u, v, y, u_next, many)


def _step_of(count, partial_sums):
    """The intrinsic for value channels `place` ... `place` + count - 1 of `step_transposed`.

    Written as vectors: the compiler does not keep sums over rows in registers by itself. Of each
    sum there are so many parts, over alternate rows (a divisor of K), as an addition takes longer
    than a row.
    """

    @intrinsic
    def step_lanes(context, s, t, after, decay, beta, k, r, alpha, u, v, y, u_next, place):
        kinds = (decay, beta, k, r, alpha, u, v, y, u_next)

        def make(context, builder, signature, args):
            transposed = context.make_array(s)(context, builder, args[0])
            data = _row_pointers(context, builder, kinds, args[1:3], args[3:-1])
            lanes = ir.VectorType(context.get_value_type(s.dtype), count)
            _emit_step(builder, lanes, partial_sums, transposed, data, args[-1])
            return context.get_dummy_value()

        return types.none(s, t, after, *kinds, place), make

    return step_lanes


def _row_pointers(context, builder, kinds, rows, arrays):
    """Where a vector begins, or the row of an array that is meant: of alpha the second one."""
    token, next_token = rows
    pointers = []
    for i, (kind, array) in enumerate(zip(kinds, arrays, strict=True)):
        at = None if kind.ndim == 1 else next_token if i == 4 else token
        pointers.append(row_pointer(context, builder, kind, array, at))
    return pointers


def _emit_step(builder, lanes, partial_sums, transposed, data, first):
    """The step of the value channels from `first` on, one to a lane."""
    index = ir.IntType(64)
    rows, width = (builder.extract_value(transposed.shape, i) for i in range(2))

    def channels(array):
        return builder.gep(array, [first])

    def every_lane(array, j):
        return splat(builder, builder.load(builder.gep(array, [j])), lanes)

    u_lanes, v_lanes = (load_lanes(builder, channels(x), lanes) for x in data[5:7])
    sums = [
        [cgutils.alloca_once_value(builder, ir.Constant(lanes, None)) for _ in range(2)]
        for _ in range(partial_sums)
    ]

    def row(j, totals):
        where = channels(builder.gep(transposed.data, [builder.mul(j, width)]))
        new = builder.fmul(load_lanes(builder, where, lanes), every_lane(data[0], j))
        new = add_product(builder, new, u_lanes, every_lane(data[1], j))
        new = add_product(builder, new, v_lanes, every_lane(data[2], j))
        store_lanes(builder, new, where)
        for total, array in zip(totals, data[3:5], strict=True):
            added = add_product(builder, builder.load(total), new, every_lane(array, j))
            builder.store(added, total)

    groups = builder.udiv(rows, index(partial_sums))
    with cgutils.for_range(builder, groups) as group:
        start = builder.mul(group.index, index(partial_sums))
        for m, totals in enumerate(sums):
            row(builder.add(start, index(m)), totals)
    for m, array in enumerate(data[7:9]):
        whole = builder.load(sums[0][m])
        for others in sums[1:]:
            whole = builder.fadd(whole, builder.load(others[m]))
        store_lanes(builder, whole, channels(array))


_step_lanes, _step_many = _step_of(LANES, 2), _step_of(2 * LANES, 1)
