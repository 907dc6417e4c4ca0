"""Products of activations with a weight matrix, by the fastest routine that torch carries.

Axes: O outputs, I inputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """`x @ weight.T`: [..., I] and [O, I] of one dtype -> [..., O].

    Differentiable as `torch.nn.functional.linear` is. On a CPU, without gradients, float32:

    - One row is bound by reading the weights, which the matrix-vector product of BLAS does on one
      core: here each core reads its share of the rows, in one batched product.
    - More rows go to oneDNN rather than to BLAS: as fast on Intel, a third faster on AMD.
    """
    training = torch.is_grad_enabled() and (x.requires_grad or weight_OI.requires_grad)
    if training or x.dtype != torch.float32 or x.device.type != "cpu":
        return F.linear(x, weight_OI)
    if x.numel() == x.shape[-1]:
        return _one_row(x, weight_OI)
    if torch.backends.mkldnn.is_available() and not torch.is_autocast_enabled("cpu"):
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_OI, None, "none", [], "")
        return y
    return F.linear(x, weight_OI)


def _one_row(x: Tensor, weight_OI: Tensor) -> Tensor:
    cores = torch.get_num_threads()
    if len(weight_OI) % cores:
        return F.linear(x, weight_OI)
    shares = weight_OI.view(cores, -1, x.shape[-1])
    column = x.view(1, -1).t()  # a column with the strides of a row: with stride 1, a third as fast
    return torch.bmm(shares, column.expand(cores, -1, 1)).view(*x.shape[:-1], -1)
