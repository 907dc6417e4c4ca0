# mypy: allow-untyped-defs, allow-incomplete-defs
"""The squared ReLU in Triton as an operator of torch, forward and backward one pass each.

Names: i_ index, p_ pointer, b_ block, o_ offset, m_ mask.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@triton.jit
def _forward_kernel(p_x, p_y, count, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.maximum(tl.load(p_x + o, mask=o < count, other=0.0).to(tl.float32), 0.0)
    tl.store(p_y + o, (b_x * b_x).to(p_y.dtype.element_ty), mask=o < count)


@triton.jit
def _backward_kernel(p_x, p_dy, p_dx, count, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.maximum(tl.load(p_x + o, mask=o < count, other=0.0).to(tl.float32), 0.0)
    b_dy = tl.load(p_dy + o, mask=o < count, other=0.0).to(tl.float32)
    tl.store(p_dx + o, (2.0 * b_x * b_dy).to(p_dx.dtype.element_ty), mask=o < count)


def forward(x: Tensor) -> Tensor:
    """Launch: relu(x)^2."""
    y = torch.empty_like(x)
    if x.numel():
        _forward_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, y, x.numel(), BLOCK=BLOCK)
    return y


def backward(x: Tensor, dy: Tensor) -> Tensor:
    """Launch: the gradient of x."""
    dx = torch.empty_like(x)
    if x.numel():
        _backward_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, dy, dx, x.numel(), BLOCK=BLOCK)
    return dx


@torch.library.custom_op("rwkvx::squared_relu", mutates_args=())
def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2 of a contiguous tensor."""
    return forward(x)


@squared_relu.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("rwkvx::squared_relu_backward", mutates_args=())
def squared_relu_backward(x: Tensor, dy: Tensor) -> Tensor:
    """The gradient of x."""
    return backward(x, dy)


@squared_relu_backward.register_fake
def _(x: Tensor, dy: Tensor) -> Tensor:
    return torch.empty_like(x)


def _save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dy: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    dx: Tensor = squared_relu_backward(x, dy.contiguous())
    return dx


squared_relu.register_autograd(_differentiate, setup_context=_save)
