# mypy: allow-untyped-defs, allow-incomplete-defs
"""Small functions that Triton kernels of several families are made of.

Names: i_ index, p_ pointer, b_ tile in registers, o_ offset, m_ mask.
"""

import torch
import triton
import triton.language as tl

from rwkvx_kernels.tools.triton_device import device_kind


def precision(dtype: torch.dtype, device: torch.device) -> str:
    """How dots multiply float32: about exactly, or in 11 bits beside inputs of 8 or 11 bits."""
    kind = device_kind(device)
    if kind.backend == "hip":
        return "tf32" if dtype != torch.float32 and kind.arch == "gfx942" else "ieee"
    return "tf32x3" if dtype == torch.float32 else "tf32"


@triton.jit
def load(p_x, o_x, m_x):
    """In float32, zero where masked."""
    return tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)


@triton.jit
def store(p_x, o_x, b_x, m_x):
    tl.store(p_x + o_x, b_x.to(p_x.dtype.element_ty), mask=m_x)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def load_rows(p_x, o_row, m_row, o_d, stride, D: tl.constexpr):
    """Rows `o_row`, so many elements apart, of D channels: [rows, BLOCK_D], zeros where masked."""
    m_x = m_row[:, None] & (o_d < D)[None, :]
    return tl.load(p_x + o_row.to(tl.int64)[:, None] * stride + o_d[None, :], mask=m_x, other=0.0)


@triton.jit
def store_rows(p_x, o_row, m_row, o_d, b_x, D: tl.constexpr):
    """The inverse of `load_rows`, of rows that lie one after the other."""
    m_x = m_row[:, None] & (o_d < D)[None, :]
    tl.store(p_x + o_row[:, None] * D + o_d[None, :], b_x.to(p_x.dtype.element_ty), mask=m_x)


@triton.jit
def normalise(b_y, m_y, eps, D: tl.constexpr):
    """y with mean 0 and variance 1 over the last axis, and one over its deviation."""
    b_mean = tl.sum(b_y, axis=-1, keep_dims=True) / D
    b_centred = tl.where(m_y, b_y - b_mean, 0.0)
    b_variance = tl.sum(b_centred * b_centred, axis=-1, keep_dims=True) / D
    b_inverse = 1.0 / tl.sqrt(b_variance + eps)
    return b_centred * b_inverse, b_inverse


@triton.jit
def finite(b_x):
    """With zeros for what is not finite: a weight of zero then makes a zero of it."""
    return tl.where(tl.abs(b_x.to(tl.float32)) < float("inf"), b_x, 0.0)


@triton.jit
def softmax_step(b_top, b_sum, b_acc, b_score):
    """A running softmax (binary exponentials) meets scores [rows, keys].

    Returns the largest score so far, the sum and the weighted values as they now count, and the
    weights of the new keys.
    """
    b_new = tl.maximum(b_top, tl.max(b_score, axis=1))
    b_shrink = tl.exp2(b_top - b_new)
    b_weight = tl.exp2(b_score - b_new[:, None])
    return b_new, b_sum * b_shrink + tl.sum(b_weight, axis=1), b_acc * b_shrink[:, None], b_weight
