"""The largest of a few hundred scores, compiled."""

from rwkvx_kernels.compiled import order_free

# Scores are cut into so many groups, every LANES-th into one: their maxima are maxima of vectors.
LANES = 64
# Halvings of an interval of scores: more than there are bits in a number.
STEPS = 64


@order_free
def largest(scores, row, count, wanted, index, room):
    """Where the `wanted` largest of the first `count` scores of a row are; -1 after the last.

    The best n lie in the n groups of largest maximum. Of equal scores, any.

    Args:
        index: int64, of wanted + 1 elements or more; written.
        room: two rows as scores, two rows of int64, each of LANES + wanted · count / LANES elements
            or more: scratch memory.
    """
    values, places = room
    if wanted >= LANES or count <= 2 * LANES:
        for i in range(count):
            values[0, i] = scores[row, i]
        _above(values[0], count, wanted, index)
        return
    for i in range(LANES):
        values[0, i] = scores[row, i]
    whole = count // LANES * LANES
    for start in range(LANES, whole, LANES):
        for i in range(LANES):
            values[0, i] = max(values[0, i], scores[row, start + i])
    for i in range(whole, count):
        values[0, i - whole] = max(values[0, i - whole], scores[row, i])
    _above(values[0], LANES, wanted, places[0])
    if places[0, wanted - 1] < 0:  # only among numbers that are none
        index[:wanted] = -1
        return
    least = values[0, places[0, 0]]
    for i in range(wanted):
        least = min(least, values[0, places[0, i]])
    found = 0
    for i in range(wanted):
        for place in range(places[0, i], count, LANES):
            values[1, found], places[1, found] = scores[row, place], place
            found += scores[row, place] >= least
    _above(values[1], found, wanted, index)
    for i in range(wanted):
        index[i] = places[1, index[i]] if index[i] >= 0 else -1


@order_free
def _above(scores, count, wanted, index):
    """As `largest`, of the first `count` scores: halves an interval around the threshold.

    Counting is vectorised; a list kept in order would cost a mispredicted branch or two for
    every entry.
    """
    if count <= wanted:
        for i in range(wanted):
            index[i] = i if i < count else -1
        return
    low, high = scores[0], scores[0]
    for i in range(count):
        low, high = min(low, scores[i]), max(high, scores[i])
    zero, one = scores.dtype.type(0), scores.dtype.type(1)
    for _ in range(STEPS):
        middle = low + (high - low) / 2
        above = zero  # counted in the scores' own type: as many lanes to a vector
        for i in range(count):
            above += one if scores[i] > middle else zero
        if above == wanted:
            low, high = middle, middle
            break
        if above < wanted:
            high = middle
        else:
            low = middle
    found = 0
    for i in range(count):
        index[found] = i
        found += scores[i] > high
    for i in range(count if found < wanted else 0):  # equal, as far as numbers can tell
        if low <= scores[i] <= high and found < wanted:
            index[found] = i
            found += 1
