# mypy: allow-untyped-defs, allow-incomplete-defs
"""The best of one query's chunks, and the largest of a few hundred scores, compiled."""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.cpython.unsafe.numbers import trailing_zeros
from numba.extending import intrinsic

from rwkvx_kernels.tools.numba_loops import loop, order_free
from rwkvx_kernels.tools.numba_vectors import load_lanes, splat, store_lanes

# Scores are compared so many at a time, each to one bit of a number.
LANES = 64
# Halvings of an interval of scores: more than there are bits in a number.
STEPS = 64
# Halvings that leave few candidates beside those wanted.
ROUGH_STEPS = 12


@loop
def best_chunks(query, means, best, chosen):
    """The chunks of the largest products with one query, a sorted list kept by insertion."""
    best[:], chosen[:], last = -np.inf, -1, len(best) - 1
    for c in range(means.shape[0] if last >= 0 else 0):
        score = query.dtype.type(0)
        for d in range(means.shape[1]):
            score += query[d] * means[c, d]
        if score > best[last]:
            at = last
            while at > 0 and best[at - 1] < score:
                best[at], chosen[at] = best[at - 1], chosen[at - 1]
                at -= 1
            best[at], chosen[at] = score, c


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
        low, high = _bounds(scores, row, count)
        _halve(scores, row, count, wanted, low, high, index)
        return
    _largest_of_lanes(scores, row, blocks, candidates)  # type: ignore[call-arg]
    low, high = _bounds(candidates, 1, LANES)
    least, found = _reached(candidates, wanted, low, high), 0
    for block in range(blocks):
        bits: int = _not_below(scores, row, block * LANES, least)
        while bits:
            place = block * LANES + trailing_zeros(bits)
            candidates[0, found], places[found] = scores[row, place], place
            bits, found = bits & (bits - 1), found + 1
    for i in range(found, -(-found // LANES) * LANES):
        candidates[0, i] = -np.inf
    if found > wanted:
        _halve(candidates, 0, found, wanted, least, high, index)
        for i in range(wanted):
            index[i] = places[index[i]]
    else:
        for i in range(wanted):  # fewer are found among NaN
            index[i] = places[i] if i < found else i


@order_free
def _bounds(scores, row, count):
    """The smallest and the largest."""
    low, high = scores[row, 0], scores[row, 0]
    for i in range(count):
        low, high = min(low, scores[row, i]), max(high, scores[row, i])
    return low, high


@loop
def _reached(candidates, wanted, low, high):
    """A number that `wanted` lanes reach, and not many more."""
    for _ in range(ROUGH_STEPS):
        middle = low + (high - low) * candidates.dtype.type(0.5)
        reached: int = _bits(_not_below(candidates, 1, 0, middle))  # type: ignore[call-arg]
        low, high = (middle, high) if reached >= wanted else (low, middle)
        if reached == wanted:
            break
    return low


@loop
def _halve(scores, row, count, wanted, low, high, index):
    """`largest`, of more scores than wanted, all of them from `low` to `high`."""
    blocks = -(-count // LANES)
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
        bits: int = _above(scores, row, block * LANES, high)
        while bits and found < wanted:  # never more, but among NaN
            index[found] = block * LANES + trailing_zeros(bits)  # type: ignore[call-arg]
            bits, found = bits & (bits - 1), found + 1
    for i in range(count if found < wanted else 0):  # equal, as far as numbers can tell
        if low <= scores[row, i] <= high and found < wanted:
            index[found], found = i, found + 1
    for i in range(found, wanted):  # among NaN
        index[i] = i


def _load(builder, data):
    """A vector of LANES numbers."""
    return load_lanes(builder, data, ir.VectorType(data.type.pointee, LANES))


@intrinsic
def _largest_of_lanes(context, scores, row, blocks, candidates):
    """candidates[1, i] = the largest of scores[row, i], scores[row, i + LANES], ..."""

    def make(context, builder, signature, args):
        arrays = (context.make_array(signature.args[i])(context, builder, args[i]) for i in (0, 3))
        index = ir.IntType(64)
        source, target = (
            cgutils.get_item_pointer(context, builder, signature.args[i], array, [at, index(0)])
            for i, array, at in zip((0, 3), arrays, (args[1], index(1)), strict=True)
        )
        largest = cgutils.alloca_once_value(builder, _load(builder, source))
        with cgutils.for_range_slice(builder, index(1), args[2], index(1), index) as (block, _):
            place = builder.gep(source, [builder.mul(block, index(LANES))])
            new, old = _load(builder, place), builder.load(largest)
            greater = builder.fcmp_ordered(">", new, old)
            builder.store(builder.select(greater, new, old), largest)
        store_lanes(builder, builder.load(largest), target)
        return context.get_dummy_value()

    return types.none(scores, types.int64, types.int64, candidates), make


def _comparison(name):
    """Bit i of an int64: how x[row, start + i] compares with a threshold."""

    @intrinsic
    def compare(context, x, row, start, threshold):
        def make(context, builder, signature, args):
            array = context.make_array(signature.args[0])(context, builder, args[0])
            place = cgutils.get_item_pointer(context, builder, signature.args[0], array, args[1:3])
            values = _load(builder, place)
            wide = splat(builder, args[3], values.type)
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
