"""The descent of the chunk tree, compiled, for many query rows at once.

Rows are sorted by the nodes that they keep, so that a node's children, read once, meet all of its
rows. Axes as in cpu_coarse.py; K nodes that a row keeps, F = FANOUT children of a node, E columns
of a table (D of chunks, 2 D of boxes).
"""

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from rwkvx_kernels.chunk_attention.cpu_largest import LANES, largest
from rwkvx_kernels.chunk_attention.tree import FANOUT, ChunkTree
from rwkvx_kernels.compiled import array_at, in_threads, loop, order_free, read_ahead

# Rows that descend together, a quarter of the nodes of level 1 within these bounds: many share a
# node that was read; few, and their scores stay in the second-level cache.
TILE_ROWS = (128, 512)
# Sums that a score is made of.
SUMS = 8
# Fewer rows than this do not pay for laying out a node's children.
FEW_ROWS = 10


def descend(
    q_NQD: Tensor,
    means_NCD: Tensor,
    tree: ChunkTree,
    offset: int,
    heads: int,
    chunk_size: int,
    widths: list[int],
    slots: int,
) -> Tensor:
    """Chosen chunks [N, Q, slots] int64.

    Args:
        q_NQD: rows in the order of tokens and heads, the first at token `offset`.
        means_NCD: of all chunks, at least of those before the last row's.
        tree: over the chunks of whole runs before every row.
        widths: how many nodes a row keeps at level 1, 2, ...
    """
    groups, rows, _ = q_NQD.shape
    chosen = torch.empty((groups, rows, slots), dtype=torch.int64)
    late = (offset + (rows - 1) // heads) // chunk_size - tree.chunks
    boxes = [x.contiguous() for x in tree.boxes]
    leaves = np.concatenate([_addresses(run, 1) for run in tree.leaves], axis=1)
    tail = means_NCD[:, tree.chunks : tree.chunks + late].contiguous()
    tables = [leaves, *(_addresses(x) for x in boxes), _addresses(tail)]
    ends = np.cumsum([0, *(x.shape[1] for x in tables)])
    sizes = np.array([tree.chunks, *(x.shape[1] for x in boxes), late], np.int64)
    kept = np.array([slots, *widths], np.int64)
    arrays = [x.contiguous().numpy() for x in (q_NQD, tree.order_NP)]
    tile = min(max(TILE_ROWS[0], boxes[0].shape[1] // 4), TILE_ROWS[1])
    tile = min(tile, max(1, -(-groups * rows // torch.get_num_threads())))
    arguments = (tile, offset, heads, chunk_size, tree.first_level, kept, sizes, ends)
    everything = (*arguments, np.concatenate(tables, axis=1), *arrays, chosen.numpy())
    units = groups * -(-rows // tile)
    if rows == 1:
        _descend(0, units, *everything)
    else:
        in_threads(_descend, units, *everything)
    return chosen


def _addresses(x_NM: Tensor, block: int = FANOUT) -> np.ndarray:
    """Where each block of members of each group begins: [N, M / block rounded up]."""
    first = np.arange(0, x_NM.shape[1], block) * x_NM.stride(1)
    group = np.arange(len(x_NM))[:, None] * x_NM.stride(0)
    result: np.ndarray = x_NM.data_ptr() + (group + first) * x_NM.element_size()
    return result


@loop
def _descend(
    first, last, tile, offset, heads, chunk_size, first_level, widths, sizes, ends, addresses, q,
    order, chosen,
):  # fmt: skip
    """Units first ... last - 1: tiles of rows of the groups."""
    rows, dim = q.shape[1:]
    tiles, most, levels, late = -(-rows // tile), widths.max(), len(widths) - 1, sizes[-1]
    columns = max(most * FANOUT + max(FANOUT, late), sizes[first_level]) + FANOUT
    columns = columns // LANES * LANES + LANES
    kept, index = np.empty((tile, most), np.int64), np.empty(most + 1, np.int64)
    scores, pairs = np.empty((tile, columns), q.dtype), np.empty(tile * most, np.int64)
    maxima = np.empty(LANES, q.dtype)
    table, everyone = np.empty((2 * dim, FANOUT), q.dtype), np.arange(tile)
    corners = np.empty((tile, dim), np.int64)
    for unit in range(first, last):
        n, begin = unit // tiles, unit % tiles * tile
        mine = q[n, begin : min(rows, begin + tile)]
        for row in range(len(mine)):  # `tree.box_queries`: upper corners first, then lower ones
            for d in range(dim):
                corners[row, d] = d + dim if mine[row, d] < 0 else d
        width, parents = 0, 0
        for level in range(first_level, 0, -1):
            members, children = sizes[level], width * FANOUT
            blocks = addresses[n, ends[level] : ends[level + 1]]
            _children(
                mine, corners, kept, width, blocks[:parents], 2 * dim, False, table, pairs, scores
            )
            for i in range(parents, len(blocks)):  # without a parent
                block = array_at(blocks[i], (min(FANOUT, members - i * FANOUT), 2 * dim), table)
                place = children + (i - parents) * FANOUT
                _meet(mine, corners, everyone[: len(mine)], 1, block, table, scores, place)
            count = children + members - parents * FANOUT
            keep = min(widths[level], count)
            for row in range(len(mine)):
                largest(scores, row, count, keep, index, maxima)
                for i in range(keep):
                    index[i] = _member(index[i], kept, row, children, parents * FANOUT)
                for i in range(keep):
                    kept[row, i] = index[i]
            width, parents = keep, members
        children = width * FANOUT
        blocks, tail = addresses[n, : ends[1]], addresses[n, ends[levels + 1] :]
        _children(mine, corners, kept, width, blocks, dim, True, table, pairs, scores)
        for i in range(len(tail)):
            block = array_at(tail[i], (min(FANOUT, late - i * FANOUT), dim), table)
            place = children + i * FANOUT
            _meet(mine, corners, everyone[: len(mine)], 1, block, table, scores, place)
        for row in range(len(mine)):
            past = (offset + (begin + row) // heads) // chunk_size
            largest(scores, row, children + past - sizes[0], widths[0], index, maxima)
            for i in range(widths[0]):
                chunk = _member(index[i], kept, row, children, sizes[0])
                inside = chunk >= 0 and chunk < sizes[0]
                chosen[n, begin + row, i] = order[n, chunk] if inside else chunk


@loop
def _member(column, kept, row, children, parentless):
    """The number of the member with that column of scores: children of `kept`, then the others."""
    if column < 0:
        return column
    if column < children:
        return kept[row, column // FANOUT] * FANOUT + column % FANOUT
    return parentless + column - children


@loop
def _children(q, corners, kept, width, blocks, columns, laid_out, table, pairs, scores):
    """Scores of the children of each row's nodes: F columns of `scores` for each of them.

    Blocks are [F, columns], or `laid_out` as [columns, F].
    """
    stops = np.zeros(len(blocks) + 1, np.int64)
    for row in range(len(q)):
        for i in range(width):
            stops[kept[row, i] + 1] += 1
    for node in range(len(blocks)):
        stops[node + 1] += stops[node]
    place = stops.copy()
    for row in range(len(q)):
        for i in range(width):
            pairs[place[kept[row, i]]] = row * width + i
            place[kept[row, i]] += 1
    size = FANOUT * columns * table.itemsize
    for node in range(len(blocks)):
        if stops[node] == stops[node + 1]:
            continue
        following = node + 1
        while following < len(blocks) and stops[following] == stops[following + 1]:
            following += 1
        if following < len(blocks):
            read_ahead(blocks[following], size)
        mine = pairs[stops[node] : stops[node + 1]]
        if laid_out:
            block = array_at(blocks[node], (columns, FANOUT), table)
            _score_pairs(q, corners, mine, width, block, scores, 0)
        else:
            block = array_at(blocks[node], (FANOUT, columns), table)
            _meet(q, corners, mine, width, block, table, scores, 0)


@loop
def _meet(q, corners, pairs, width, block, table, scores, column):
    """Scores of a block of members [F or fewer, E], for pair row · width + i at F i + `column`."""
    if len(pairs) >= FEW_ROWS:
        for f in range(len(block)):
            for e in range(block.shape[1]):
                table[e, f] = block[f, e]
        _score_pairs(q, corners, pairs, width, table[: block.shape[1]], scores, column)
        return
    for p in range(len(pairs)):
        row = pairs[p] // width
        _score_few(q, row, block, scores, (pairs[p] - row * width) * FANOUT + column)


@loop
def _score_pairs(q, corners, pairs, width, table, scores, column):
    """As `_meet`, of members laid out as [E, F]."""
    # No slices in here: each would count a reference, which costs as much as the scores.
    for p in range(len(pairs)):
        row = pairs[p] // width
        place = (pairs[p] - row * width) * FANOUT + column
        _score(q, row, corners, table, len(table), scores, place)  # type: ignore[call-arg]


@intrinsic
def _score(context, q, row, corners, table, columns, out, place):
    """out[row, place : place + F] = q[row] [D] · table [D, F]; of boxes, their best corners.

    `columns` is D or 2 D; then `corners` [rows, D] say which row of the table belongs to q[row, d].

    Written as vectors of F lanes: left to itself, the compiler makes a third of this speed of it.
    """

    def make(context, builder, signature, args):
        number = context.get_value_type(q.dtype)
        lanes = ir.VectorType(number, FANOUT)
        index = ir.IntType(64)
        q_array, corner_array, table_array, out_array = (
            context.make_array(signature.args[i])(context, builder, args[i]) for i in (0, 2, 3, 5)
        )
        rows = (_row(builder, x, args[1]) for x in (q_array, corner_array, out_array))
        q_data, corner_data, out_data = rows
        out_data = builder.gep(out_data, [args[6]])
        table_data, dim = table_array.data, builder.extract_value(q_array.shape, 1)
        # Sums side by side: one alone would wait for each addition to end.
        zero = ir.Constant(lanes, None)
        sums = [cgutils.alloca_once_value(builder, zero) for _ in range(SUMS)]

        def add(d, total, boxes):
            x, row = builder.load(builder.gep(q_data, [d])), d
            if boxes:
                row = builder.load(builder.gep(corner_data, [d]))
            place = builder.gep(table_data, [builder.mul(row, ir.Constant(index, FANOUT))])
            values = builder.load(builder.bitcast(place, lanes.as_pointer()), align=4)
            one = builder.insert_element(ir.Constant(lanes, ir.Undefined), x, ir.IntType(32)(0))
            zeros = ir.Constant(ir.VectorType(ir.IntType(32), FANOUT), None)
            wide = builder.shuffle_vector(one, ir.Constant(lanes, ir.Undefined), zeros)
            product = builder.fmul(wide, values, flags=("contract",))
            builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)

        def add_all(boxes):
            none, one, step = (ir.Constant(index, i) for i in (0, 1, SUMS))
            whole = builder.mul(builder.udiv(dim, step), step)
            with cgutils.for_range_slice(builder, none, whole, step, index) as (d, _):
                for i, total in enumerate(sums):
                    add(builder.add(d, ir.Constant(index, i)), total, boxes)
            with cgutils.for_range_slice(builder, whole, dim, one, index) as (d, _):
                add(d, sums[0], boxes)

        with builder.if_else(builder.icmp_signed(">", args[4], dim)) as branches:
            for branch, boxes in zip(branches, (True, False), strict=True):
                with branch:
                    add_all(boxes)
        both = builder.load(sums[0])
        for total in sums[1:]:
            both = builder.fadd(both, builder.load(total))
        builder.store(both, builder.bitcast(out_data, lanes.as_pointer()), align=4)
        return context.get_dummy_value()

    integer = types.int64
    return types.none(q, integer, corners, table, integer, out, integer), make


def _row(builder, array, row):
    """Pointer to the beginning of a row of a matrix."""
    stride = builder.extract_value(array.strides, 0)
    start = builder.ptrtoint(array.data, ir.IntType(64))
    return builder.inttoptr(builder.add(start, builder.mul(row, stride)), array.data.type)


@order_free
def _score_few(q, row, block, out, place):
    """As `_score`, of members [F, E] that are not laid out."""
    dim = q.shape[1]
    boxes, zero = block.shape[1] > dim, q.dtype.type(0)
    for f in range(len(block)):
        total = zero
        if boxes:
            for d in range(dim):
                total += (
                    max(q[row, d], zero) * block[f, d] + min(q[row, d], zero) * block[f, dim + d]
                )
        else:
            for d in range(dim):
                total += q[row, d] * block[f, d]
        out[row, place + f] = total
