"""The recurrence of WKV7 itself, compiled: the fastest form on a CPU where no gradient is needed.

Axes: B batch, T time, H heads, K key channels, V value channels; N sequences.
"""

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from rwkvx_kernels.compiled import in_threads, loop

# So many tokens times heads are done before a second thread has woken up.
FEW = 64
# Value channels that go through a step together, one to a lane of a vector.
LANES = 16
# So many tokens are worth turning a state over and back.
WORTH_TURNING = 8


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
        if start == stop:
            continue
        product(s, alpha[start, h], u)
        lanes, turned = turn(s, stop - start)
        for t in range(start, stop):
            after = alpha[min(t + 1, stop - 1), h]
            vectors = decay[t, h], beta[t, h], k[t, h], r[t, h], after, u, v[t, h], y[t, h], u_next
            if lanes:
                step_turned(turned, *vectors)
            else:
                step(s, *vectors)
            u[:] = u_next
        if lanes:
            s[:] = turned.T


@loop
def product(s, x, y):
    """y = S x."""
    y[:] = 0
    for i in range(s.shape[0]):
        for j in range(s.shape[1]):
            y[i] += s[i, j] * x[j]


@loop
def turn(s, tokens):
    """Whether `step_turned` can do so many tokens and is worth it; then S^T, else nothing."""
    lanes = tokens >= WORTH_TURNING and s.shape[0] % LANES == 0 and s.shape[1] % 2 == 0
    return lanes, (s.T if lanes else s[:0].T).copy()


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


@loop
def step_turned(turned, decay, beta, k, r, after, u, v, y, u_next):
    """As `step`, of S^T [K, V]: sums run along its rows, never across lanes."""
    for i in range(0, len(y), LANES):
        _step_lanes(turned, decay, beta, k, r, after, u, v, y, u_next, i)  # type: ignore[call-arg]


@intrinsic
def _step_lanes(context, s, decay, beta, k, r, after, u, v, y, u_next, place):
    """Value channels `place` ... `place` + LANES - 1 of `step_turned`, K even.

    Written as vectors: the compiler does not keep sums over rows in registers by itself.
    """

    def make(context, builder, signature, args):
        number, index = context.get_value_type(s.dtype), ir.IntType(64)
        lanes = ir.VectorType(number, LANES)
        *arrays, first = args
        parts = [
            context.make_array(kind)(context, builder, array)
            for kind, array in zip(signature.args, arrays, strict=False)
        ]
        data, width = [x.data for x in parts], builder.extract_value(parts[0].shape, 1)
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), None)

        def vector(array):
            return builder.bitcast(builder.gep(array, [first]), lanes.as_pointer())

        def every_lane(array, j):
            x = builder.load(builder.gep(array, [j]))
            one = builder.insert_element(ir.Constant(lanes, ir.Undefined), x, ir.IntType(32)(0))
            return builder.shuffle_vector(one, ir.Constant(lanes, ir.Undefined), zeros)

        def plus(total, a, b):
            flags = ("contract",)
            return builder.fadd(total, builder.fmul(a, b, flags=flags), flags=flags)

        u_lanes, v_lanes = (builder.load(vector(x), align=4) for x in data[6:8])
        # Two pairs of sums, over even and odd rows: one alone would wait for each addition to end.
        sums = [
            [cgutils.alloca_once_value(builder, ir.Constant(lanes, None)) for _ in range(2)]
            for _ in range(2)
        ]

        def row(j, y_sum, next_sum):
            start = builder.add(builder.mul(j, width), first)
            where = builder.bitcast(builder.gep(data[0], [start]), lanes.as_pointer())
            new = builder.fmul(builder.load(where, align=4), every_lane(data[1], j))
            new = plus(new, u_lanes, every_lane(data[2], j))
            new = plus(new, v_lanes, every_lane(data[3], j))
            builder.store(new, where, align=4)
            for total, array in ((y_sum, data[4]), (next_sum, data[5])):
                builder.store(plus(builder.load(total), new, every_lane(array, j)), total)

        half = builder.lshr(builder.extract_value(parts[0].shape, 0), ir.Constant(index, 1))
        with cgutils.for_range(builder, half) as pairs:
            even = builder.shl(pairs.index, ir.Constant(index, 1))
            row(even, *sums[0])
            row(builder.add(even, ir.Constant(index, 1)), *sums[1])
        for a, b, array in zip(*sums, data[8:10], strict=True):
            both = builder.fadd(builder.load(a), builder.load(b))
            builder.store(both, vector(array), align=4)
        return context.get_dummy_value()

    return types.none(s, decay, beta, k, r, after, u, v, y, u_next, types.int64), make
