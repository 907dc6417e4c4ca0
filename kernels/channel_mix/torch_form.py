"""The squared ReLU in plain torch, in place where that is allowed."""

from typing import Any

import torch
from torch import Tensor


def squared_relu_torch(x: Tensor, in_place: bool) -> Tensor:
    """As `api.squared_relu`."""
    if in_place:
        return x.relu_().square_()
    return _SquaredRelu.apply(x) if x.requires_grad else torch.relu(x).square()


class _SquaredRelu(torch.autograd.Function):
    """Two passes over the tensor each way; autograd's own powers take twice as many."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = torch.relu(x)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return gradient * positive * 2
