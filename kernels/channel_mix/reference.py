"""The squared ReLU by its equation, on any device."""

import torch
from torch import Tensor


def squared_relu_reference(x: Tensor) -> Tensor:
    """As `api.squared_relu`."""
    return torch.relu(x) ** 2
