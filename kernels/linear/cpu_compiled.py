"""One row times a matrix, compiled: bound by reading the matrix once.

bfloat16 numbers travel as their 16 bits, the upper half of a float32. Axes as in api.py.
"""

import numpy as np
import torch
from numba import int16, prange
from numba.extending import overload
from torch import Tensor

from rwkvx_kernels.compiled import loop, parallel_loop

ACTIVATIONS = {"none": 0, "tanh": 1, "sigmoid": 2}


def matrix_times_vector(weight_OI: Tensor, x: Tensor) -> Tensor:
    """[O, I] times [..., I] of one row -> [..., O] in the dtype of x."""
    y = np.empty(weight_OI.shape[0], np.float32)
    _product(_array(weight_OI), _vector(x), y, torch.get_num_threads())
    return torch.from_numpy(y).to(x.dtype).view(*x.shape[:-1], -1)


def low_rank_of_vector(x: Tensor, down_IR: Tensor, up_RO: Tensor, activation: str) -> Tensor:
    """As `api.low_rank`, of one row."""
    y = np.empty(up_RO.shape[1], np.float32)
    _low_rank(_vector(x), _array(down_IR), _array(up_RO), ACTIVATIONS[activation], y)
    return torch.from_numpy(y).to(x.dtype).view(*x.shape[:-1], -1)


def _array(x: Tensor) -> np.ndarray:
    x = x.detach()
    array: np.ndarray = (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()
    return array


def _vector(x: Tensor) -> np.ndarray:
    array: np.ndarray = x.detach().float().view(-1).numpy()
    return array


def widen(x):
    """float32 as it is; the 16 bits of a bfloat16 -> float32. For compiled loops."""
    raise NotImplementedError


@overload(widen, inline="always")
def _widen(x):
    if x == int16:
        return lambda x: np.int32(np.int32(x) << np.int32(16)).view(np.float32)
    return lambda x: x


@parallel_loop
def _product(weight, x, y, parts):
    rows = len(y)
    for part in prange(parts):
        for o in range(rows * part // parts, rows * (part + 1) // parts):
            total = np.float32(0)
            for i in range(len(x)):
                total += widen(weight[o, i]) * x[i]
            y[o] = total


@loop
def _low_rank(x, down, up, activation, y):
    hidden = np.zeros(down.shape[1], np.float32)
    for i in range(len(x)):
        for r in range(len(hidden)):
            hidden[r] += x[i] * widen(down[i, r])
    for r in range(len(hidden)):
        if activation == 1:
            hidden[r] = np.tanh(hidden[r])
        elif activation == 2:
            hidden[r] = np.float32(1) / (np.float32(1) + np.exp(-hidden[r]))
    y[:] = 0
    for r in range(len(hidden)):
        for o in range(len(y)):
            y[o] += hidden[r] * widen(up[r, o])
