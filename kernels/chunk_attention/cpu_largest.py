"""The largest of a few hundred scores, compiled."""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.cpython.unsafe.numbers import trailing_zeros
from numba.extending import intrinsic

from rwkvx_kernels.compiled import order_free

# Scores are compared so many at a time, each to one bit of a number.
LANES = 64
# Halvings of an interval of scores: more than there are bits in a number.
STEPS = 64


@order_free
def largest(scores, row, count, wanted, index, maxima):
    """Where the `wanted` largest of the first `count` scores of a row are; -1 after the last.

    Halves an interval around the threshold, counting what lies above: a list kept in order would
    cost a mispredicted branch or two for every entry. Of equal scores, any.

    Args:
        scores: with columns up to the next multiple of LANES, which are written after `count`.
        index: int64, of `wanted` elements or more; written.
        maxima: [LANES] as scores, scratch memory.
    """
    if count <= wanted:
        for i in range(wanted):
            index[i] = i if i < count else -1
        return
    blocks = -(-count // LANES)
    for i in range(count, blocks * LANES):
        scores[row, i] = -np.inf
    for i in range(LANES):
        maxima[i] = scores[row, i]
    for block in range(1, blocks):
        for i in range(LANES):
            maxima[i] = max(maxima[i], scores[row, block * LANES + i])
    low, high = maxima[0], maxima[0]
    for i in range(min(count, LANES)):
        low, high = min(low, maxima[i]), max(high, maxima[i])
    if wanted > LANES or count < LANES:  # else LANES scores are as large as `low`, or larger
        for i in range(count):
            low = min(low, scores[row, i])
    for _ in range(STEPS):
        middle, above = low + (high - low) * scores.dtype.type(0.5), 0
        for block in range(blocks):
            above += _bits(_above(scores, row, block * LANES, middle))  # type: ignore[call-arg]
        if above == wanted:
            low, high = middle, middle
            break
        if above < wanted:
            high = middle
        else:
            low = middle
    found = 0
    for block in range(blocks):
        bits: int = _above(scores, row, block * LANES, high)  # type: ignore[call-arg]
        while bits:
            index[found] = block * LANES + trailing_zeros(bits)
            bits, found = bits & (bits - 1), found + 1
    for i in range(count if found < wanted else 0):  # equal, as far as numbers can tell
        if low <= scores[row, i] <= high and found < wanted:
            index[found], found = i, found + 1
    index[found:wanted] = -1


@intrinsic
def _above(context, x, row, start, threshold):
    """Bit i of an int64: x[row, start + i] > threshold."""

    def make(context, builder, signature, args):
        array = context.make_array(signature.args[0])(context, builder, args[0])
        lanes = ir.VectorType(context.get_value_type(signature.args[0].dtype), LANES)
        place = cgutils.get_item_pointer(context, builder, signature.args[0], array, args[1:3])
        values = builder.load(builder.bitcast(place, lanes.as_pointer()), align=4)
        one = builder.insert_element(ir.Constant(lanes, ir.Undefined), args[3], ir.IntType(32)(0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), None)
        wide = builder.shuffle_vector(one, ir.Constant(lanes, ir.Undefined), zeros)
        return builder.bitcast(builder.fcmp_ordered(">", values, wide), ir.IntType(64))

    return types.int64(x, types.int64, types.int64, x.dtype), make


@intrinsic
def _bits(context, x):
    """How many bits of an int64 are set."""

    def make(context, builder, signature, args):
        return builder.ctpop(args[0])

    return types.int64(types.int64), make
