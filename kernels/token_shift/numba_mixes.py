# mypy: allow-untyped-defs, allow-incomplete-defs
"""Layer norm and token shift in one pass over memory, compiled, with gradients.

A row stays in the first-level cache from the norm to the last mix; torch reads and writes it some
ten times. Axes: R rows (tokens of all sequences), C width, S sequences, M mixes.
"""

import numpy as np
import torch
from torch import Tensor

from rwkvx_kernels.dispatch import check_cu_seqlens, without_autocast
from rwkvx_kernels.token_shift.common import MOST_MIXES, Norm
from rwkvx_kernels.tools.numba_loops import in_threads, loop
from rwkvx_kernels.tools.numba_scalars import as_array, narrow, widen

# Numbers that one thread is quicker with than several.
FEW = 2**14
# Rows whose gradients of weights are summed together: the same sums with any number of threads.
ROWS = 128


def token_shift_compiled(
    x: Tensor,
    previous: Tensor,
    mixes: list[Tensor],
    cu_seqlens: Tensor | None,
    norm: Norm | None,
    dtype: torch.dtype,
) -> list[Tensor]:
    """As `api.token_shift`; mixes come in `dtype`."""
    batch, tokens, _ = x.shape
    if cu_seqlens is None:
        starts = np.arange(batch) * tokens
    else:
        starts = np.array(check_cu_seqlens(cu_seqlens, batch, tokens)[:-1], np.int64)
    weight, bias, eps = norm or (None, None, 0.0)
    settings = (starts, batch * tokens, eps, dtype)
    return list(_Mixes.apply(settings, x, previous, weight, bias, *mixes))


class _Mixes(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, settings, x, previous, weight, bias, *mixes):
        starts, rows, eps, dtype = settings
        ctx.settings, ctx.normed = (starts, rows, eps), weight is not None
        ctx.save_for_backward(x, previous, weight, bias, *mixes)
        outs = tuple(torch.empty(x.shape, dtype=dtype) for _ in mixes)
        arrays = _six(outs)
        given = (_rows(x), _rows(previous), _first_of(starts, rows))
        table = _table(x, weight, bias, mixes)
        arguments = (*given, table, eps, ctx.normed, arrays)
        if x.numel() <= FEW:
            _forward(0, rows, *arguments)
        else:
            in_threads(_forward, rows, *arguments)
        return outs

    @staticmethod
    @torch.autograd.function.once_differentiable
    @without_autocast
    def backward(ctx, *gradients):
        x, previous, weight, bias, *mixes = ctx.saved_tensors
        starts, rows, eps = ctx.settings
        table = _table(x, weight, bias, mixes)
        units = -(-rows // ROWS)
        dx = torch.empty(x.shape, dtype=x.dtype)
        dprevious = torch.zeros(previous.shape, dtype=previous.dtype)
        sums = np.zeros((units, *table.shape), table.dtype)
        given = (_rows(x), _rows(previous), _first_of(starts, rows))
        arrays = _six(gradients)
        made = (_rows(dx), _rows(dprevious), sums)
        in_threads(_backward, units, *given, table, eps, ctx.normed, arrays, *made)
        dweight, dbias, *dmixes = torch.from_numpy(sums.sum(axis=0))
        found = zip((weight, bias, *mixes), (dweight, dbias, *dmixes), strict=True)
        return (
            None, dx, dprevious, *(None if own is None else g.to(own.dtype) for own, g in found)
        )  # fmt: skip


def _rows(x: Tensor) -> np.ndarray:
    return as_array(x.contiguous().view(-1, x.shape[-1]))


def _six(tensors):
    """As many arrays as there can be, the last ones again: compiled once for any number."""
    arrays = tuple(_rows(x) for x in tensors)
    return (*arrays, *arrays[-1:] * (MOST_MIXES - len(arrays)))


def _first_of(starts, rows):
    """[R + 1]: the sequence that starts at a row, -1 where none does; behind the last row: 0."""
    found = np.full(rows + 1, -1, np.int64)
    found[starts] = np.arange(len(starts))  # of several at one row all but the last are empty
    found[rows] = 0
    return found


def _table(x, weight, bias, mixes):
    """[2 + M, C]: weight and bias of the norm, then the mixes."""
    kind = torch.promote_types(x.dtype, torch.float32)
    none = x.new_zeros(x.shape[-1])
    both = (none, none) if weight is None else (weight, bias)
    return torch.stack([t.detach().to(kind) for t in (*both, *mixes)]).numpy()


@loop
def _statistics(x, row, eps, values):
    """x of a row, and its mean and inverse deviation."""
    width, zero = x.shape[1], values.dtype.type(0)
    total = zero
    for c in range(width):
        values[c] = widen(x[row, c])
        total += values[c]
    mean = total / width
    spread = zero
    for c in range(width):
        spread += (values[c] - mean) * (values[c] - mean)
    return mean, values.dtype.type(1) / np.sqrt(spread / width + values.dtype.type(eps))


@loop
def _norm(x, row, table, eps, normed, values):
    """A row, with its layer norm if `normed`, rounded as x is."""
    width = x.shape[1]
    if not normed:
        for c in range(width):
            values[c] = widen(x[row, c])
        return
    mean, scale = _statistics(x, row, eps, values)
    for c in range(width):
        y = (values[c] - mean) * scale * table[0, c] + table[1, c]
        values[c] = widen(narrow(y, x[0, 0]))


@loop
def _token_before(x, previous, row, sequence, table, eps, normed, values):
    if sequence < 0:
        _norm(x, row - 1, table, eps, normed, values)
        return
    for c in range(len(values)):
        values[c] = widen(previous[sequence, c])


@loop
def _forward(first, last, x, previous, first_of, table, eps, normed, outs):
    """Rows first ... last - 1."""
    width = x.shape[1]
    both = np.empty((2, width), table.dtype)
    if first < last:
        _token_before(x, previous, first, first_of[first], table, eps, normed, both[first % 2])
    for row in range(first, last):
        before, now = both[row % 2], both[1 - row % 2]
        if row > first and first_of[row] >= 0:
            _token_before(x, previous, row, first_of[row], table, eps, normed, before)
        _norm(x, row, table, eps, normed, now)
        for m in range(len(table) - 2):
            out = outs[m]
            for c in range(width):
                mixed = now[c] + (before[c] - now[c]) * table[2 + m, c]
                out[row, c] = narrow(mixed, out[0, 0])


@loop
def _backward(
    first, last, x, previous, first_of, table, eps, normed, gradients, dx, dprevious, sums
):  # fmt: skip
    """Units first ... last - 1 of ROWS rows, each from its last row to its first.

    sums: [units, 2 + M, C], gradients of the rows of `table`, to be added up.
    """
    width = x.shape[1]
    both = np.empty((2, width), table.dtype)
    dnormed, carried, values = (
        np.empty(width, table.dtype), np.empty(width, table.dtype), np.empty(width, table.dtype)
    )  # fmt: skip
    for unit in range(first, last):
        start, stop = unit * ROWS, min((unit + 1) * ROWS, len(x))
        # What the next row's mixes send back to the token before it.
        carried[:] = 0
        if first_of[stop] < 0:
            for m in range(len(table) - 2):
                for c in range(width):
                    carried[c] += widen(gradients[m][stop, c]) * table[2 + m, c]
        _norm(x, stop - 1, table, eps, normed, both[stop % 2])
        for row in range(stop - 1, start - 1, -1):
            now, before = both[(row + 1) % 2], both[row % 2]
            sequence = first_of[row]
            _token_before(x, previous, row, sequence, table, eps, normed, before)
            for c in range(width):
                dnormed[c] = carried[c]
                carried[c] = 0
            for m in range(len(table) - 2):
                g, dmix, mix = gradients[m], sums[unit, 2 + m], table[2 + m]
                for c in range(width):
                    there = widen(g[row, c])
                    back = there * mix[c]
                    dnormed[c] += there - back
                    carried[c] += back
                    dmix[c] += there * (before[c] - now[c])
            if sequence >= 0:
                for c in range(width):
                    dprevious[sequence, c] = narrow(carried[c], dprevious[0, 0])
                    carried[c] = 0
                if row > start:  # `before` was what was given; the next row needs its own
                    _norm(x, row - 1, table, eps, normed, before)
            if normed:
                _norm_backward(x, row, table, eps, dnormed, values, sums[unit])
            for c in range(width):
                dx[row, c] = narrow(dnormed[c], dx[0, 0])


@loop
def _norm_backward(x, row, table, eps, gradient, values, sums):
    """From the gradient of a normed row to that of the row, in its place."""
    width = x.shape[1]
    mean, scale = _statistics(x, row, eps, values)
    straight, along = values.dtype.type(0), values.dtype.type(0)
    for c in range(width):
        values[c] = (values[c] - mean) * scale
        sums[0, c] += gradient[c] * values[c]
        sums[1, c] += gradient[c]
        inner = gradient[c] * table[0, c]
        straight += inner
        along += inner * values[c]
    straight, along = straight / width, along / width
    for c in range(width):
        gradient[c] = (gradient[c] * table[0, c] - straight - values[c] * along) * scale
