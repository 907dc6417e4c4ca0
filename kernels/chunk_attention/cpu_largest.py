"""The largest of a few hundred scores, compiled."""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.cpython.unsafe.numbers import trailing_zeros
from numba.extending import intrinsic

from rwkvx_kernels.compiled import loop, order_free

# Scores are compared so many at a time, each to one bit of a number.
LANES = 64
# Halvings of an interval of scores: more than there are bits in a number.
STEPS = 64
# Halvings that leave few candidates beside those wanted.
ROUGH_STEPS = 12


@loop
def largest(scores, row, count, wanted, index, candidates, places):
    """Where the `wanted` largest of the first `count` scores of a row are; -1 after the last.

    A list kept in order would cost a mispredicted branch or two for every entry. Instead, an
    interval around a threshold is halved, counting what lies above. First for the largest of each
    lane: as many lanes as are wanted reach that threshold, so do as many scores, and few more.
    Then for these few. Of equal scores, any.

    Args:
        scores: with columns up to the next multiple of LANES, which are written after `count`.
        index: int64, of `wanted` elements or more; written.
        candidates: one row as those of `scores`, and one for the lanes; scratch memory.
        places: int64, of as many elements as a row has; scratch memory.
    """
    if count <= wanted:
        for i in range(wanted):
            index[i] = i if i < count else -1
        return
    blocks = -(-count // LANES)
    for i in range(count, blocks * LANES):
        scores[row, i] = -np.inf
    if wanted > LANES or count < 2 * LANES:
        _halve(scores, row, count, wanted, index)
        return
    _largest_of_lanes(scores, row, blocks, candidates)
    least, found = _reached(candidates, wanted), 0
    for block in range(blocks):
        bits: int = _not_below(scores, row, block * LANES, least)  # type: ignore[call-arg]
        while bits:
            place = block * LANES + trailing_zeros(bits)
            candidates[0, found], places[found] = scores[row, place], place
            bits, found = bits & (bits - 1), found + 1
    for i in range(found, -(-found // LANES) * LANES):
        candidates[0, i] = -np.inf
    if found > wanted:
        _halve(candidates, 0, found, wanted, index)
        for i in range(wanted):
            index[i] = places[index[i]]
    else:
        for i in range(wanted):  # fewer are found among numbers that are none
            index[i] = places[i] if i < found else i


@order_free
def _largest_of_lanes(scores, row, blocks, candidates):
    for i in range(LANES):
        candidates[1, i] = scores[row, i]
    for block in range(1, blocks):
        for i in range(LANES):
            candidates[1, i] = max(candidates[1, i], scores[row, block * LANES + i])


@order_free
def _reached(candidates, wanted):
    """A number that `wanted` lanes reach, and not many more."""
    low, high = candidates[1, 0], candidates[1, 0]
    for i in range(LANES):
        low, high = min(low, candidates[1, i]), max(high, candidates[1, i])
    for _ in range(ROUGH_STEPS):
        middle = low + (high - low) * candidates.dtype.type(0.5)
        reached = _bits(_not_below(candidates, 1, 0, middle))  # type: ignore[call-arg]
        if reached >= wanted:
            low = middle
        else:
            high = middle
        if reached == wanted:
            break
    return low


@order_free
def _halve(scores, row, count, wanted, index):
    """`largest`, of more scores than wanted, all of them candidates."""
    blocks = -(-count // LANES)
    low, high = scores[row, 0], scores[row, 0]
    for i in range(count):
        low, high = min(low, scores[row, i]), max(high, scores[row, i])
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
    for i in range(found, wanted):  # among numbers that are none
        index[i] = i


def _comparison(name):
    """Bit i of an int64: how x[row, start + i] compares with a threshold."""

    @intrinsic
    def compare(context, x, row, start, threshold):
        def make(context, builder, signature, args):
            array = context.make_array(signature.args[0])(context, builder, args[0])
            lanes = ir.VectorType(context.get_value_type(signature.args[0].dtype), LANES)
            place = cgutils.get_item_pointer(context, builder, signature.args[0], array, args[1:3])
            values = builder.load(builder.bitcast(place, lanes.as_pointer()), align=4)
            undefined = ir.Constant(lanes, ir.Undefined)
            one = builder.insert_element(undefined, args[3], ir.IntType(32)(0))
            zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), None)
            wide = builder.shuffle_vector(one, undefined, zeros)
            return builder.bitcast(builder.fcmp_ordered(name, values, wide), ir.IntType(64))

        return types.int64(x, types.int64, types.int64, x.dtype), make

    return compare


_above, _not_below = _comparison(">"), _comparison(">=")


@intrinsic
def _bits(context, x):
    """How many bits of an int64 are set."""

    def make(context, builder, signature, args):
        return builder.ctpop(args[0])

    return types.int64(types.int64), make
