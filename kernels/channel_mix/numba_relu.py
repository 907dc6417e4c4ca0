# mypy: allow-untyped-defs, allow-incomplete-defs
"""The squared ReLU in one compiled pass each way."""

import torch
from torch import Tensor

from rwkvx_kernels.tools.numba_loops import in_threads, loop
from rwkvx_kernels.tools.numba_scalars import as_array, narrow, widen

# Numbers that one thread is quicker with than several.
FEW = 2**15


def squared_relu_compiled(x: Tensor, overwrite: bool) -> Tensor:
    """As `api.squared_relu`; `overwrite` of a contiguous x."""
    if overwrite:
        _run(_square_in_place, x)
        return x
    result: Tensor = _SquaredRelu.apply(x)
    return result


class _SquaredRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        ctx.save_for_backward(x)
        out = torch.empty_like(x)
        _run(_square, x, out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        out = torch.empty_like(x)
        _run(_gradient, x, gradient.contiguous(), out)
        return out


def _run(work, *tensors: Tensor) -> None:
    arrays, count = [as_array(x.view(-1)) for x in tensors], tensors[0].numel()
    if count <= FEW:
        work(0, count, *arrays)
    else:
        in_threads(work, count, *arrays)


@loop
def _square(first, last, x, out):
    part, target = x[first:last], out[first:last]  # counted from 0, a loop becomes vectors
    for i in range(len(part)):
        value = _positive(widen(part[i]))
        target[i] = narrow(value * value, out[0])


# Apart from `_square`: where both arrays may be one, there are no vectors.
@loop
def _square_in_place(first, last, x):
    part = x[first:last]
    for i in range(len(part)):
        value = _positive(widen(part[i]))
        part[i] = narrow(value * value, x[0])


@loop
def _gradient(first, last, x, gradient, out):
    part, given, target = x[first:last], gradient[first:last], out[first:last]
    for i in range(len(part)):
        value = _positive(widen(part[i]))
        target[i] = narrow((value + value) * widen(given[i]), out[0])


@loop
def _positive(x):
    """Or zero; a NaN stays one."""
    return type(x)(0) if x < 0 else x
