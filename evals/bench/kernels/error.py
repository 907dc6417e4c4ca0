"""Errors against float64, the same way for every family of cases."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def relative_error(got: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest of the tensors' root mean squared errors, each relative to its own size."""
    pairs = zip(got, exact, strict=True)
    return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)


def backward_of(y: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of a weighted sum of `y`, the same weights for every dtype."""
    generator = torch.Generator(y.device).manual_seed(1)
    dy = torch.randn(y.shape, generator=generator, device=y.device).bfloat16()
    return torch.autograd.grad(y, list(inputs), dy.to(y.dtype))
