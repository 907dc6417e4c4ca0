"""Products of activations with weights, by the fastest routine at hand; differentiable.

Axes: I inputs, O outputs, R rank.
"""

from functools import cache
from platform import machine

import torch
import torch.nn.functional as F
from torch import Tensor

COMPILED = (torch.float32, torch.bfloat16)


def linear(
    x: Tensor, weight_OI: Tensor, scale_O: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """`x @ weight.T`: [..., I] and [O, I] of one dtype -> [..., O].

    An int8 weight stands for `weight * scale[:, None]`, without gradients.

    On a CPU, without gradients:

    - One row is bound by reading the weights, which BLAS does on one core and in bfloat16 at half
      of the speed: a compiled loop reads them with all cores.
    - More rows in float32 go to oneDNN: a third faster than BLAS on AMD. In bfloat16, too, on a
      processor without instructions for it, where torch's own product is three times slower.
    """
    if scale_O is not None:
        return _quantized(x, weight_OI, scale_O)
    if _plain(x, weight_OI):
        return F.linear(x, weight_OI)
    if _one_row(x) and weight_OI.is_contiguous():
        from rwkvx_kernels.linear.cpu_compiled import matrix_times_vector

        return matrix_times_vector(weight_OI, x)
    if x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_OI, None, "none", [], "")
        return y
    if x.dtype == torch.bfloat16 and not _multiplies_bfloat16():
        return linear(x.float(), weight_OI.float()).to(x.dtype)
    return F.linear(x, weight_OI)


def _quantized(x: Tensor, weight_OI: Tensor, scale_O: Tensor) -> Tensor:
    if x.device.type == "cpu" and _one_row(x) and not torch.compiler.is_compiling():
        from rwkvx_kernels.linear.cpu_compiled import matrix_times_vector

        return matrix_times_vector(weight_OI, x, scale_O)
    return linear(x, weight_OI.to(x.dtype)) * scale_O.to(x.dtype)


def low_rank(
    x: Tensor, down_IR: Tensor, up_RO: Tensor, activation: str = "none", impl: str = "auto"
) -> Tensor:
    """`activation(x @ down) @ up`: [..., I] -> [..., O]; activation "none", "tanh" or "sigmoid".

    One row on a CPU, without gradients, in a compiled loop: one call instead of three.
    """
    if _one_row(x) and not _plain(x, down_IR, up_RO):
        from rwkvx_kernels.linear.cpu_compiled import low_rank_of_vector

        return low_rank_of_vector(x, down_IR, up_RO, activation)
    hidden = linear(x, down_IR.T)
    if activation == "tanh":
        hidden = torch.tanh(hidden)
    elif activation == "sigmoid":
        hidden = torch.sigmoid(hidden)
    return linear(hidden, up_RO.T)


@cache
def _multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for it; not asked of others than x86."""
    x86 = machine().lower() in ("x86_64", "amd64")
    return not x86 or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _plain(*tensors: Tensor) -> bool:
    """Whether torch's own products are taken: for gradients, on a GPU, by its compiler."""
    if tensors[0].device.type != "cpu" or torch.compiler.is_compiling():
        return True
    if torch.is_autocast_enabled("cpu"):
        return True
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _one_row(x: Tensor) -> bool:
    return x.numel() == x.shape[-1] and x.dtype in COMPILED
