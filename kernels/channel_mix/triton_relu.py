# mypy: allow-untyped-defs, allow-incomplete-defs
"""The squared ReLU in Triton as an operator of torch, forward and backward one pass each.

Names: i_ index, p_ pointer, b_ tile in registers, o_ offset, m_ mask.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvx_kernels.channel_mix.options import TABLE
from rwkvx_kernels.tools.operators import operator
from rwkvx_kernels.tools.sizes import ceil_div
from rwkvx_kernels.tools.triton_options import options_for
from rwkvx_kernels.tools.triton_tiles import load, store


@triton.jit
def _forward_kernel(p_x, p_y, count, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.maximum(load(p_x, o, o < count), 0.0)
    store(p_y, o, b_x * b_x, o < count)


@triton.jit
def _backward_kernel(p_x, p_dy, p_dx, count, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.maximum(load(p_x, o, o < count), 0.0)
    store(p_dx, o, 2.0 * b_x * load(p_dy, o, o < count), o < count)


def _launch(stage: str, x: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """Grid, constants and options."""
    options = options_for(TABLE, stage, x.dtype, 1, x.device)
    block = options.rows * options.columns
    return (ceil_div(x.numel(), block),), {"BLOCK": block, **options.launch}


def forward(x: Tensor) -> Tensor:
    """Launch: relu(x)^2."""
    y = torch.empty_like(x)
    if x.numel():
        grid, constants = _launch("forward", x)
        _forward_kernel[grid](x, y, x.numel(), **constants)
    return y


def backward(x: Tensor, dy: Tensor) -> Tensor:
    """Launch: the gradient of x."""
    dx = torch.empty_like(x)
    if x.numel():
        grid, constants = _launch("backward", x)
        _backward_kernel[grid](x, dy, dx, x.numel(), **constants)
    return dx


@operator("squared_relu", torch.empty_like, lambda grads, _, x: [backward(*x, *grads)])
def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2 of a contiguous tensor."""
    return forward(x)
