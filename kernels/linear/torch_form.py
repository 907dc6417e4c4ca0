"""Products with weights by the fastest routine that torch has.

Axes: I inputs, O outputs, R rank.
"""

from functools import cache
from pathlib import Path
from platform import machine, processor

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkvx_kernels.dispatch import Facts, facts_of
from rwkvx_kernels.linear.common import ACTIVATIONS


def linear_torch(
    x: Tensor, weight_OI: Tensor, scale_O: Tensor | None = None, facts: Facts | None = None
) -> Tensor:
    """As `api.linear`.

    Without gradients on a CPU, float32 goes to oneDNN: a third faster than BLAS on AMD. So does
    bfloat16 on a processor without instructions for it, where torch's own product is three times
    slower.
    """
    if scale_O is not None:
        return linear_torch(x, weight_OI.to(x.dtype), None, facts) * scale_O.to(x.dtype)
    facts = facts or facts_of(x, weight_OI)
    own = facts.gradients or facts.traced or torch.is_autocast_enabled(x.device.type)
    if not own and x.device.type == "cpu":
        if x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_OI, None, "none", [], "")
            return y
        if x.dtype == torch.bfloat16 and not multiplies_bfloat16():
            return linear_torch(x.float(), weight_OI.float()).to(x.dtype)
    return F.linear(x, weight_OI)


def low_rank_torch(
    x: Tensor, down_IR: Tensor, up_RO: Tensor, activation: str, facts: Facts
) -> Tensor:
    """As `api.low_rank`."""
    hidden = ACTIVATIONS[activation](linear_torch(x, down_IR.T, None, facts))
    return linear_torch(hidden, up_RO.T, None, facts)


@cache
def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for it; not asked of others than x86."""
    x86 = machine().lower() in ("x86_64", "amd64")
    return not x86 or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@cache
def mkl_is_fast() -> bool:
    """Whether torch's BLAS is MKL on a processor for which MKL takes its fast paths, an Intel."""
    if not torch.backends.mkl.is_available():
        return False
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return "GenuineIntel" in processor()
