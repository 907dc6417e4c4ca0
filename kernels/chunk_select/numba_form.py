# mypy: allow-untyped-defs, allow-incomplete-defs
"""Selection of past chunks, compiled: the descent of the chunk tree for many query rows at once.

Rows are sorted by the nodes that they keep, so that a node's children, read once, meet all of its
rows. Axes as in common.py; Q query rows of a group, K nodes that a row keeps, F = FANOUT children
of a node, E columns of a table (D of chunks, D + 1 of nodes).
"""

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from rwkvx_kernels.chunk_select import common
from rwkvx_kernels.chunk_select.common import FANOUT
from rwkvx_kernels.chunk_select.numba_largest import LANES, largest
from rwkvx_kernels.chunk_select.tree import ChunkTree, TreeOf, by_tree, empty_tree
from rwkvx_kernels.tools.numba_loops import array_at, in_threads, loop, order_free, read_ahead
from rwkvx_kernels.tools.numba_vectors import add_product, load_lanes, splat, store_lanes

# Rows that descend together: many share a node that was read. Of many scores fewer rows.
TILE_ROWS, TILE_SCORES = 512, 1 << 21
# Rows that meet a node's children together, which are loaded once for all of them.
ROWS = 4
# Sums that a score of a single row is made of: one would wait for each addition to end.
SUMS = 8
# Fewer rows than this do not pay for laying out the chunks after the tree.
FEW_ROWS = 10
# A pair of row and slot is row · SLOTS + slot.
SLOTS = 1 << 16


def select_compiled(
    q_NTRD: Tensor, means_NCD: Tensor, trees: TreeOf | None, offset: int, chunk_size: int, topk: int
) -> Tensor:
    """As `torch_form.select_torch`, on the CPU."""
    chosen = q_NTRD.new_empty((*q_NTRD.shape[:3], topk - 1), dtype=torch.int64)
    for part, tree in by_tree(q_NTRD.shape[1], offset, chunk_size, topk, trees):
        q_NQD = q_NTRD[:, part].flatten(1, 2)
        arguments = (offset + part.start, q_NTRD.shape[2], chunk_size, topk)
        own = _select(q_NQD, means_NCD, tree or empty_tree(means_NCD), *arguments)
        chosen[:, part] = own.view_as(chosen[:, part])
    return chosen


def _select(
    q_NQD: Tensor,
    means_NCD: Tensor,
    tree: ChunkTree,
    offset: int,
    heads: int,
    chunk_size: int,
    topk: int,
) -> Tensor:
    """Chosen chunks [N, Q, slots] int64 of rows in the order of tokens and heads, the first at
    token `offset`; `tree` is over the chunks of whole runs before every row."""
    groups, rows, _ = q_NQD.shape
    chosen = torch.empty((groups, rows, topk - 1), dtype=torch.int64)
    late = (offset + (rows - 1) // heads) // chunk_size - tree.chunks
    tail = means_NCD[:, tree.chunks : tree.chunks + late].contiguous()
    leaves = [_addresses(run) for run in tree.leaves]
    tables = [
        np.concatenate([np.empty((groups, 0), np.int64), *leaves], axis=1),
        *(_addresses(x) for x in tree.nodes),
        _addresses(tail, FANOUT),
    ]
    ends = np.cumsum([0, *(x.shape[1] for x in tables)])
    levels = range(len(tree.nodes) + 1)
    sizes = np.array([*(tree.chunks // FANOUT**level for level in levels), late], np.int64)
    kept = np.array([common.kept_at(level, topk) for level in levels], np.int64)
    arrays = [x.contiguous().numpy() for x in (common.node_queries(q_NQD), tree.order_NP)]
    tile = min(TILE_ROWS, max(1, -(-groups * rows // torch.get_num_threads())))
    tile = min(tile, max(ROWS, TILE_SCORES // max(1, late)))
    first_level = common.first_level(tree.chunks)
    everything = (
        *(tile, offset, heads, chunk_size, first_level, kept, sizes, ends),
        *(np.concatenate(tables, axis=1), *arrays, chosen.numpy()),
    )
    units = groups * -(-rows // tile)
    if rows == 1:
        _descend(0, units, *everything)
    else:
        in_threads(_descend, units, *everything)
    return chosen


def _addresses(x_NM: Tensor, step: int = 1) -> np.ndarray:
    """Where every so many of M begin, for each group: [N, M / step rounded up]."""
    first = np.arange(0, x_NM.shape[1], step) * x_NM.stride(1)
    group = np.arange(len(x_NM))[:, None] * x_NM.stride(0)
    result: np.ndarray = x_NM.data_ptr() + (group + first) * x_NM.element_size()
    return result


@loop
def _descend(
    first, last, tile, offset, heads, chunk_size, first_level, widths, sizes, ends, addresses, q,
    order, chosen,
):  # fmt: skip
    """Units first ... last - 1: tiles of rows of the groups. q: [N, Q, D + 1], `node_queries`."""
    rows, dim = q.shape[1], q.shape[2] - 1
    tiles, most, levels, late = -(-rows // tile), widths.max(), len(widths) - 1, sizes[-1]
    columns = max(most * FANOUT + max(FANOUT, late), sizes[first_level]) + FANOUT
    columns = columns // LANES * LANES + LANES
    kept, index = np.empty((tile, most), np.int64), np.empty(most + 1, np.int64)
    scores, pairs = np.empty((tile, columns), q.dtype), np.empty(tile * most, np.int64)
    candidates, places = np.empty((2, columns), q.dtype), np.empty(columns, np.int64)
    table, everyone = np.empty((dim, FANOUT), q.dtype), np.arange(tile) * SLOTS
    for unit in range(first, last):
        n, begin = unit // tiles, unit % tiles * tile
        mine = q[n, begin : min(rows, begin + tile)]
        width, parents = 0, 0
        for level in range(first_level, 0, -1):
            members, children = sizes[level], width * FANOUT
            tables = addresses[n, ends[level] : ends[level + 1]]
            _children(mine, kept, width, tables[:parents], dim + 1, pairs, scores)
            for i in range(parents, len(tables)):  # without a parent
                orphans = array_at(tables[i], (dim + 1, FANOUT), scores)
                place = children + (i - parents) * FANOUT
                _score_pairs(mine, everyone[: len(mine)], orphans, scores, place)
            count = children + members - parents * FANOUT
            keep = min(widths[level], count)
            for row in range(len(mine)):
                largest(scores, row, count, keep, index, candidates, places)
                for i in range(keep):
                    index[i] = _member(index[i], kept, row, children, parents * FANOUT)
                for i in range(keep):
                    kept[row, i] = index[i]
            width, parents = keep, members
        children = width * FANOUT
        tables, tail = addresses[n, : ends[1]], addresses[n, ends[levels + 1] :]
        _children(mine, kept, width, tables, dim, pairs, scores)
        for i in range(len(tail)):
            chunks = array_at(tail[i], (min(FANOUT, late - i * FANOUT), dim), scores)
            _score_rows(mine, everyone[: len(mine)], chunks, table, scores, children + i * FANOUT)
        for row in range(len(mine)):
            past = (offset + (begin + row) // heads) // chunk_size
            count = children + past - sizes[0]
            largest(scores, row, count, widths[0], index, candidates, places)
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
def _children(q, kept, width, tables, columns, pairs, scores):
    """Scores of the children of each row's nodes, tables [columns, F]: F columns of `scores` for
    each of them."""
    stops = np.zeros(len(tables) + 1, np.int64)
    for row in range(len(q)):
        for i in range(width):
            stops[kept[row, i] + 1] += 1
    for node in range(len(tables)):
        stops[node + 1] += stops[node]
    place = stops.copy()
    for row in range(len(q)):
        for i in range(width):
            pairs[place[kept[row, i]]] = row * SLOTS + i
            place[kept[row, i]] += 1
    size = FANOUT * columns * scores.itemsize
    for node in range(len(tables)):
        if stops[node] == stops[node + 1]:
            continue
        following = node + 1
        while following < len(tables) and stops[following] == stops[following + 1]:
            following += 1
        if following < len(tables):
            read_ahead(tables[following], size)
        mine = pairs[stops[node] : stops[node + 1]]
        _score_pairs(q, mine, array_at(tables[node], (columns, FANOUT), scores), scores, 0)


@loop
def _score_rows(q, pairs, members, table, scores, column):
    """As `_score_pairs`, of members that are not laid out: [F or fewer, E]."""
    if len(pairs) >= FEW_ROWS:
        for f in range(len(members)):
            for e in range(members.shape[1]):
                table[e, f] = members[f, e]
        _score_pairs(q, pairs, table, scores, column)
        return
    for p in range(len(pairs)):
        row, slot = pairs[p] // SLOTS, pairs[p] % SLOTS
        _score_few(q, row, members, scores, slot * FANOUT + column)


@loop
def _score_pairs(q, pairs, table, scores, column):
    """Scores of the F members of a table [E, F], for pair (row, i) at F i + `column`."""
    # No slices in here: each would count a reference, which costs as much as the scores.
    together = len(pairs) // ROWS * ROWS
    for p in range(0, together, ROWS):
        _score_together(q, pairs, p, table, scores, column)
    for p in range(together, len(pairs)):
        _score_alone(q, pairs, p, table, scores, column)


def _scorer(rows, sums):
    """Of pairs p ... p + rows - 1: out[row, place : place + F] = q[row] [E] · table [E, F].

    Written as vectors of F lanes: left to itself, the compiler makes a third of this speed of it.
    """

    @intrinsic
    def score(context, q, pairs, p, table, out, column):
        def make(context, builder, signature, args):
            number = context.get_value_type(q.dtype)
            lanes, index = ir.VectorType(number, FANOUT), ir.IntType(64)
            q_array, pair_array, table_array, out_array = (
                context.make_array(signature.args[i])(context, builder, args[i])
                for i in (0, 1, 3, 4)
            )
            queries, places, zero = [], [], ir.Constant(lanes, None)
            for i in range(rows):
                at = builder.add(args[2], ir.Constant(index, i))
                pair = builder.load(builder.gep(pair_array.data, [at]))
                row = builder.sdiv(pair, ir.Constant(index, SLOTS))
                slot = builder.srem(pair, ir.Constant(index, SLOTS))
                shift = builder.add(builder.mul(slot, ir.Constant(index, FANOUT)), args[5])
                queries.append(_row(builder, q_array, row))
                places.append(builder.gep(_row(builder, out_array, row), [shift]))
            totals = [
                [cgutils.alloca_once_value(builder, zero) for _ in range(sums)] for _ in range(rows)
            ]

            def add(e, which):
                place = builder.gep(table_array.data, [builder.mul(e, ir.Constant(index, FANOUT))])
                values = load_lanes(builder, place, lanes)
                for query, total in zip(queries, totals, strict=True):
                    x = splat(builder, builder.load(builder.gep(query, [e])), lanes)
                    old = builder.load(total[which])
                    builder.store(add_product(builder, old, x, values), total[which])

            columns = builder.extract_value(table_array.shape, 0)
            none, one, step = (ir.Constant(index, i) for i in (0, 1, sums))
            whole = builder.mul(builder.udiv(columns, step), step)
            with cgutils.for_range_slice(builder, none, whole, step, index) as (e, _):
                for i in range(sums):
                    add(builder.add(e, ir.Constant(index, i)), i)
            with cgutils.for_range_slice(builder, whole, columns, one, index) as (e, _):
                add(e, 0)
            for total, place in zip(totals, places, strict=True):
                result = builder.load(total[0])
                for part in total[1:]:
                    result = builder.fadd(result, builder.load(part))
                store_lanes(builder, result, place)
            return context.get_dummy_value()

        integer = types.int64
        return types.none(q, pairs, integer, table, out, integer), make

    return score


_score_together, _score_alone = _scorer(ROWS, 1), _scorer(1, SUMS)


def _row(builder, array, row):
    """Pointer to the beginning of a row of a matrix."""
    stride = builder.extract_value(array.strides, 0)
    start = builder.ptrtoint(array.data, ir.IntType(64))
    return builder.inttoptr(builder.add(start, builder.mul(row, stride)), array.data.type)


@order_free
def _score_few(q, row, members, out, place):
    """As `_scorer`, of members [F, E] that are not laid out."""
    for f in range(len(members)):
        total = q.dtype.type(0)
        for e in range(members.shape[1]):
            total += q[row, e] * members[f, e]
        out[row, place + f] = total
