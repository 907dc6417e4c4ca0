# mypy: allow-untyped-defs, allow-incomplete-defs
"""Gradients of the compiled recurrence, token by token from the last to the first (README.md).

With G_t the gradient of S_t, u_t = S_{t-1} alpha_t and y_t = S_t r_t:

    reading t:  dr_t = S_t^T dy_t;  G_t += dy_t r_t^T
                dv_t = G_t k_t;  dk_t = G_t^T v_t;  du_t = G_t beta_t;  dbeta_t = G_t^T u_t
    moving t:   d(decay_t)_j = sum_i (G_t)_ij (S_{t-1})_ij;  dalpha_t = S_{t-1}^T du_t
                G_{t-1} = G_t diag(decay_t) + du_t alpha_t^T

Moving one token and reading the one before is one pass over G and S_{t-1}. States are stored every
`PIECE` tokens by the forward pass and made again in between.

Axes: H heads, K key channels, V value channels; a row is a token of a head.
"""

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from rwkvx_kernels.dispatch import without_autocast
from rwkvx_kernels.tools.numba_loops import copy_matrix, in_threads, loop
from rwkvx_kernels.tools.numba_vectors import (
    add_product,
    load_lanes,
    row_pointer,
    splat,
    store_lanes,
    sum_of_lanes,
)
from rwkvx_kernels.wkv7.numba_recurrence import Pieces, run

# Tokens between two stored states; so many states are held at once by a thread (16 KB each).
PIECE = 32
# Key channels that go through a step together: two vectors of so many numbers.
LANES = 16
KEYS = 2 * LANES


def wkv7_with_gradients(*inputs: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """As `numba_recurrence.wkv7_compiled`, differentiable; K a multiple of `KEYS`."""
    y, state = _Recurrence.apply(lengths, *inputs)
    return y, state


class _Recurrence(torch.autograd.Function):
    """`run`, keeping the rows, every `PIECE`th state and u."""

    @staticmethod
    def forward(ctx, lengths, *inputs):
        ctx.pieces, ctx.shapes = Pieces(lengths, PIECE), [x.shape for x in inputs]
        y, state, rows, kept = run(inputs, ctx.pieces)
        ctx.save_for_backward(*rows, *kept, state)
        return y, state.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    @without_autocast
    def backward(ctx, dy, d_final):
        *rows, saved, u, final = ctx.saved_tensors
        gradients = [torch.empty_like(x) for x in rows]
        d_state = d_final.clone(memory_format=torch.contiguous_format)
        arrays = [tuple(x.numpy() for x in xs) for xs in (rows, gradients)]
        others = [x.numpy() for x in (u, dy.reshape(u.shape).contiguous())]
        ends, before = ctx.pieces.ends, ctx.pieces.before
        bounds = (len(ends) * final.shape[1], ends, before, saved.numpy(), final.numpy())
        in_threads(_backward, *bounds, arrays[0], *others, arrays[1], d_state.numpy())
        shaped = zip((*gradients, d_state), ctx.shapes, strict=True)
        return (None, *(x.view(shape) for x, shape in shaped))


@loop
def _backward(first, last, ends, pieces, saved, final, inputs, u, dy, gradients, d_state):
    """Units first ... last - 1, numbered by sequence and head.

    inputs: r, decay, k, v, alpha, beta as rows [rows, K or V]; gradients: theirs, to be filled.
    saved: [pieces, H, V, K], the state before every piece; pieces: of all sequences before.
    d_state: of the final state; becomes that of the initial one.
    """
    heads, values, keys = final.shape[1:]
    before = np.empty((PIECE, values, keys), final.dtype)
    du = np.zeros(values, final.dtype)
    sums = np.empty((2, values, LANES), final.dtype)
    for unit in range(first, last):
        n, h = unit // heads, unit % heads
        start, stop = (ends[n - 1] if n else 0), ends[n]
        if start == stop:
            continue
        g = d_state[n, h]
        for place in range(0, keys, KEYS):
            _read(
                g, final[n, h], 0, (stop - 1) * heads + h, inputs, du, dy, u, gradients, sums, place
            )
        _sum_lanes(sums, gradients[3], (stop - 1) * heads + h, du)  # type: ignore[call-arg]
        for piece in range((stop - start - 1) // PIECE, -1, -1):
            here = start + piece * PIECE
            there = min(here + PIECE, stop)
            copy_matrix(saved[pieces[n] + piece, h], before[0])
            for t in range(here, there - 1):
                m = t - here
                for place in range(0, keys, KEYS):
                    _step(before[m], before[m + 1], t * heads + h, inputs, u, place)
            for t in range(there - 1, here - 1, -1):
                row, s = t * heads + h, before[t - here]
                if t == start:
                    for place in range(0, keys, KEYS):
                        _move(g, s, row, row, inputs, du, dy, u, gradients, sums, place)
                    continue
                for place in range(0, keys, KEYS):
                    _move_and_read(
                        g, s, row, row - heads, inputs, du, dy, u, gradients, sums, place
                    )
                _sum_lanes(sums, gradients[3], row - heads, du)


class _Emitter:
    """What the loops below are emitted with: 2 LANES key channels from `place` on, by vectors."""

    def __init__(self, context, builder, kinds, args, place):
        self.context, self.builder, self.kinds, self.args = context, builder, kinds, args
        self.lanes = ir.VectorType(context.get_value_type(kinds[0].dtype), LANES)
        self.none, self.place = ir.Constant(self.lanes, None), place

    def pointer(self, at, row=None, item=None):
        """To argument number `at` (or an item of it), or to a row of it."""
        kind, array = self.kinds[at], self.args[at]
        if item is not None:
            kind, array = kind[item], self.builder.extract_value(array, item)
        return row_pointer(self.context, self.builder, kind, array, row)

    def shape(self, at):
        array = self.context.make_array(self.kinds[at])(self.context, self.builder, self.args[at])
        return [self.builder.extract_value(array.shape, i) for i in range(self.kinds[at].ndim)]

    def channels(self, row, block):
        """To a row's key channels of block 0 or 1."""
        place = self.builder.add(self.place, self.place.type(block * LANES))
        return self.builder.gep(row, [place])

    def load(self, row):
        """Both blocks of a row."""
        return [load_lanes(self.builder, self.channels(row, c), self.lanes) for c in range(2)]

    def row(self, matrix, i, width):
        return self.builder.gep(matrix, [self.builder.mul(i, width)])

    def splat(self, column, i):
        number = self.builder.load(self.builder.gep(column, [i]))
        return splat(self.builder, number, self.lanes)

    def add_product(self, total, a, b):
        return add_product(self.builder, total, a, b)


@intrinsic
def _step(context, old, new, row, inputs, u, place):
    """S_t from S_{t-1} and u_t, key channels `place` ... `place` + 2 LANES - 1."""

    def make(context, builder, signature, args):
        emit = _Emitter(context, builder, signature.args, args, args[-1])
        decay, k, beta = (emit.load(emit.pointer(3, args[2], i)) for i in (1, 2, 5))
        v_row, u_row = emit.pointer(3, args[2], 3), emit.pointer(4, args[2])
        values, keys = emit.shape(0)
        with cgutils.for_range(builder, values) as loop_over:
            i = loop_over.index
            u_i, v_i = emit.splat(u_row, i), emit.splat(v_row, i)
            target = emit.row(emit.pointer(1), i, keys)
            for c, x in enumerate(emit.load(emit.row(emit.pointer(0), i, keys))):
                x = emit.add_product(builder.fmul(x, decay[c]), u_i, beta[c])
                x = emit.add_product(x, v_i, k[c])
                store_lanes(builder, x, emit.channels(target, c))
        return context.get_dummy_value()

    return types.none(old, new, row, inputs, u, place), make


@intrinsic
def _sum_lanes(context, sums, dv, row, du):
    """dv_t and du_t from their parts."""

    def make(context, builder, signature, args):
        emit = _Emitter(context, builder, signature.args, args, None)
        parts, (values,) = emit.pointer(0), emit.shape(3)
        for m, target in enumerate((emit.pointer(1, args[2]), emit.pointer(3))):
            with cgutils.for_range(builder, values) as loop_over:
                i = builder.add(loop_over.index, builder.mul(values, values.type(m)))
                part = load_lanes(builder, emit.row(parts, i, values.type(LANES)), emit.lanes)
                total = sum_of_lanes(builder, part)
                builder.store(total, builder.gep(target, [loop_over.index]))
        return context.get_dummy_value()

    return types.none(sums, dv, row, du), make


def _pass_over(moves, reads):
    """The intrinsic for key channels `place` ... `place` + 2 LANES - 1 of one pass over G and S.

    moves: token `row`; reads: token `earlier`; `s` is the state in between. What is summed over
    keys (dv, du) is left as LANES parts in `sums`, beside those of earlier places.
    """

    @intrinsic
    def one_pass(context, g, s, row, earlier, inputs, du, dy, u, gradients, sums, place):
        def make(context, builder, signature, args):
            emit = _Emitter(context, builder, signature.args, args, args[-1])
            totals = _emit_rows(emit, moves, reads)
            for i, total in totals.items():
                target = emit.pointer(8, args[2 if i in MOVED else 3], i)
                for c in range(2):
                    store_lanes(builder, builder.load(total[c]), emit.channels(target, c))
            return context.get_dummy_value()

        return types.none(g, s, row, earlier, inputs, du, dy, u, gradients, sums, place), make

    return one_pass


# Of r, decay, k, v, alpha, beta: gradients along keys that a token that is moved, and read, has.
MOVED, READ = (1, 4), (0, 2, 5)


def _emit_rows(emit, moves, reads):
    """The loop over value channels; returns the sums over them, by the number of the input."""
    builder, args, add_product = emit.builder, emit.args, emit.add_product
    now, then = args[2], args[3]
    decay, alpha = (emit.load(emit.pointer(4, now, i)) for i in MOVED)
    r, k, beta = (emit.load(emit.pointer(4, then, i)) for i in READ)
    columns = (
        emit.pointer(5),
        emit.pointer(6, then),
        emit.pointer(4, then, 3),
        emit.pointer(7, then),
    )
    values, keys = emit.shape(0)
    wanted = (MOVED if moves else ()) + (READ if reads else ())
    totals = {i: [cgutils.alloca_once_value(builder, emit.none) for _ in "01"] for i in wanted}

    def total(i, c, a, b):
        builder.store(add_product(builder.load(totals[i][c]), a, b), totals[i][c])

    with cgutils.for_range(builder, values) as loop_over:
        i = loop_over.index
        du, dy, v, u = (emit.splat(x, i) for x in columns)
        g_row, parts = emit.row(emit.pointer(0), i, keys), [emit.none, emit.none]
        both = zip(emit.load(g_row), emit.load(emit.row(emit.pointer(1), i, keys)), strict=True)
        for c, (x, y) in enumerate(both):
            if moves:
                total(1, c, builder.fmul(x, decay[c]), y)  # of the decay's logarithm
                total(4, c, du, y)
                x = add_product(builder.fmul(x, decay[c]), du, alpha[c])
            if reads:
                total(0, c, y, dy)
                x = add_product(x, dy, r[c])
                total(2, c, x, v)
                total(5, c, x, u)
                parts = [add_product(parts[0], x, k[c]), add_product(parts[1], x, beta[c])]
            store_lanes(builder, x, emit.channels(g_row, c))
        if reads:
            _leave_parts(emit, parts, i, values)
    return totals


def _leave_parts(emit, parts, i, values):
    """Of value channel i of dv and du, in `sums`."""
    builder, size = emit.builder, values.type(LANES)
    first = builder.icmp_signed("==", emit.place, emit.place.type(0))
    for m, part in enumerate(parts):
        row = builder.add(i, builder.mul(values, values.type(m)))
        where = emit.row(emit.pointer(9), row, size)
        before = builder.select(first, emit.none, load_lanes(builder, where, emit.lanes))
        store_lanes(builder, builder.fadd(before, part), where)


_read, _move, _move_and_read = (
    _pass_over(False, True),
    _pass_over(True, False),
    _pass_over(True, True),
)
