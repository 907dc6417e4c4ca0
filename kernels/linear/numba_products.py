# mypy: allow-untyped-defs, allow-incomplete-defs
"""Rows times a matrix, compiled, one after the other: each is bound by reading the matrix once.

Axes as in api.py.
"""

from collections.abc import Callable

import numpy as np
import torch
from llvmlite.binding import get_host_cpu_name
from numba import prange
from torch import Tensor

from rwkvx_kernels.tools.numba_loops import loop, parallel_loop, read_ahead
from rwkvx_kernels.tools.numba_scalars import as_array, sigmoid, widen

ACTIVATIONS = {"none": 0, "tanh": 1, "sigmoid": 2}
NO_SCALE = np.empty(0, np.float32)
# How a core is kept from waiting for memory: AMD's (measured: Zen 4) read ahead by themselves, best
# in rows far from each other; Intel's (Xeons) do not where numbers are converted between loads.
FAR_ROWS = get_host_cpu_name().startswith("znver")
# Bytes between what is used of a matrix and what is asked for.
AHEAD = 4096


def matrix_times_vectors(weight_OI: Tensor, x: Tensor, scale_O: Tensor | None) -> Tensor:
    """[O, I] times every row of [..., I] -> [..., O] in the dtype of x."""
    scale = NO_SCALE if scale_O is None else as_array(scale_O.float())
    weight, threads = as_array(weight_OI), torch.get_num_threads()
    return _by_row(x, weight_OI.shape[0], lambda row, y: _product(weight, scale, row, y, threads))


def low_rank_of_vectors(x: Tensor, down_IR: Tensor, up_RO: Tensor, activation: str) -> Tensor:
    """As `api.low_rank`."""
    down, up, code = as_array(down_IR), as_array(up_RO), ACTIVATIONS[activation]
    return _by_row(x, up_RO.shape[1], lambda row, y: _low_rank(row, down, up, code, y))


def _by_row(x: Tensor, width: int, product: Callable[[np.ndarray, np.ndarray], None]) -> Tensor:
    """`product` writes the result of a row of float32, of so many elements: [..., width]."""
    rows = x.detach().float().reshape(-1, x.shape[-1]).contiguous().numpy()
    y = np.empty((len(rows), width), np.float32)
    for i in range(len(rows)):
        product(rows[i], y[i])
    return torch.from_numpy(y).to(x.dtype).view(*x.shape[:-1], width)


@loop
def product_rows(weight, scale, x, y, part, parts):
    """The share of one of `parts` in y = weight x, its rows times `scale` (empty: none).

    `weight` [O, I] is contiguous.
    """
    first, last, zero = len(y) * part // parts, len(y) * (part + 1) // parts, np.float32(0)
    size = len(x) * weight.itemsize
    address = weight.ctypes.data + AHEAD
    apart = (last - first) // 4 if FAR_ROWS else 0
    for o in range(first, first + apart):
        o1, o2, o3 = o + apart, o + 2 * apart, o + 3 * apart
        t0, t1, t2, t3 = zero, zero, zero, zero
        for i in range(len(x)):
            t0 += widen(weight[o, i]) * x[i]
            t1 += widen(weight[o1, i]) * x[i]
            t2 += widen(weight[o2, i]) * x[i]
            t3 += widen(weight[o3, i]) * x[i]
        y[o], y[o1], y[o2], y[o3] = t0, t1, t2, t3
    for o in range(first + 4 * apart, last):
        if not FAR_ROWS:
            read_ahead(address + o * size, size)
        total = zero
        for i in range(len(x)):
            total += widen(weight[o, i]) * x[i]
        y[o] = total
    if len(scale):
        for o in range(first, last):
            y[o] *= scale[o]


@loop
def add_columns(weight, x, y, first):
    """y += x times the columns of `weight` from `first` on, as many as y has: rows are streamed."""
    last, rows = first + len(y), len(x) // 4 * 4
    for i in range(0, rows, 4):
        x0, x1, x2, x3 = x[i], x[i + 1], x[i + 2], x[i + 3]
        w0, w1 = weight[i, first:last], weight[i + 1, first:last]
        w2, w3 = weight[i + 2, first:last], weight[i + 3, first:last]
        for o in range(len(y)):
            y[o] += x0 * widen(w0[o]) + x1 * widen(w1[o]) + x2 * widen(w2[o]) + x3 * widen(w3[o])
    for i in range(rows, len(x)):
        w0 = weight[i, first:last]
        for o in range(len(y)):
            y[o] += x[i] * widen(w0[o])


@loop
def activate(x, activation):
    """In place, one of `ACTIVATIONS`."""
    for r in range(len(x)):
        if activation == 1:
            x[r] = np.tanh(x[r])
        elif activation == 2:
            x[r] = sigmoid(x[r])


@parallel_loop
def _product(weight, scale, x, y, parts):
    for part in prange(parts):
        product_rows(weight, scale, x, y, part, parts)


@loop
def _low_rank(x, down, up, activation, y):
    hidden = np.zeros(down.shape[1], np.float32)
    add_columns(down, x, hidden, 0)
    activate(hidden, activation)
    y[:] = 0
    add_columns(up, hidden, y, 0)
