"""Numbers in compiled loops: narrow formats, functions that become vector instructions.

bfloat16 numbers travel as their 16 bits, the upper half of a float32. Importing this module
imports Numba.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import numpy as np
import torch
from numba import float32, int8, int16, njit
from numba.extending import overload
from torch import Tensor

from rwkvx_kernels.tools.numba_loops import loop

# exp(x) = 2^n exp(r), r = x - n ln 2 in two parts (the first exact in few bits), |r| <= ln(2) / 2.
_LOG2_E, _LN2_HIGH, _LN2_LOW = (
    np.float32(1.44269504),
    np.float32(0.693359375),
    np.float32(-2.12194440e-4),
)
# Adding it rounds to an integer, which then stands in the lowest bits.
_ROUND = np.float32(12582912.0)
# 1/k!, highest first: what is left out is below 2e-8.
_TERMS = tuple(np.float32(x) for x in (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0))
_LOWEST, _HIGHEST = np.float32(-87.0), np.float32(88.0)


def as_array(x: Tensor) -> np.ndarray:
    """The same memory; bfloat16 as int16."""
    x = x.detach()
    array: np.ndarray = (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()
    return array


def widen(x):
    """float32 and float64 as they are; the 16 bits of a bfloat16, or an int8 -> float32."""
    raise NotImplementedError


@overload(widen, inline="always")
def _widen(x):
    if x == int16:
        return lambda x: np.int32(np.int32(x) << np.int32(16)).view(np.float32)
    if x == int8:
        return lambda x: np.float32(x)
    return lambda x: x


def narrow(x, like):
    """What an array with elements as `like` holds for a float32 or float64: the nearest number."""
    raise NotImplementedError


@overload(narrow, inline="always")
def _narrow(x, like):
    if like == int16:
        return lambda x, like: _to_bfloat16(x)
    return lambda x, like: x


@njit(nogil=True)
def _to_bfloat16(x):
    if x != x:
        return np.int16(0x7FC0)
    bits = np.float32(x).view(np.int32)
    odd = (bits >> np.int32(16)) & np.int32(1)
    return np.int16((bits + np.int32(0x7FFF) + odd) >> np.int32(16))


def exp(x):
    """e^x: of float32 to two units in the last place, between -87 and 88 and constant beyond."""
    raise NotImplementedError


@overload(exp, inline="always")
def _exp(x):
    if x == float32:
        return lambda x: _exp_float32(x)
    return lambda x: np.exp(x)


# No sums reordered: that would take `_ROUND` out.
@njit(nogil=True, fastmath={"contract"})
def _exp_float32(x):
    low, high = np.float32(_LOWEST), np.float32(_HIGHEST)
    x = low if x < low else x  # a NaN stays one
    x = high if x > high else x
    shifted = x * _LOG2_E + _ROUND
    n = shifted - _ROUND
    r = x - n * _LN2_HIGH
    r = r - n * _LN2_LOW
    y = _TERMS[0]
    y = y * r + _TERMS[1]
    y = y * r + _TERMS[2]
    y = y * r + _TERMS[3]
    y = y * r + _TERMS[4]
    y = y * r + _TERMS[5]
    y = y * r + _TERMS[6]
    y = y * r + _TERMS[7]
    exponent = (np.float32(shifted).view(np.int32) << np.int32(23)) + np.int32(0x3F800000)
    return y * np.int32(exponent).view(np.float32)


@loop
def sigmoid(x):
    """1 / (1 + e^-x)."""
    one = type(x)(1)
    return one / (one + exp(-x))
