# mypy: allow-untyped-defs, allow-incomplete-defs
"""Launches that begin before the one before them has ended (programmatic dependent launch, CUDA).

A small kernel waits longer for its launch and for its first bytes than it computes. Launched with
`overlapping(device)` it may begin early, and must call `wait_for_launches` before it touches
anything that an earlier launch of the same chain reads or writes. What nobody writes (weights), and
what was last written two launches ago, may be asked for before.
https://docs.nvidia.com/cuda/cuda-c-programming-guide/#programmatic-dependent-launch-and-synchronization
"""

from typing import Any

import torch
import triton
import triton.language as tl

from rwkvx_kernels.tools.triton_device import device_kind, interpreted

# NVIDIA's first architecture that has it.
LEAST_CAPABILITY = 90


@triton.jit
def wait_for_launches(OVERLAP: tl.constexpr):
    """In every program, whatever it does: what earlier launches wrote is there after this.

    The next launch may begin once all programs are here, so that no more than two are under way.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def overlapping(device: torch.device) -> dict[str, Any]:
    """The constant OVERLAP, and the option of the launch where the device has it."""
    kind = device_kind(device)
    if interpreted() or kind.backend != "cuda" or int(kind.arch) < LEAST_CAPABILITY:
        return {"OVERLAP": False}
    return {"OVERLAP": True, "launch_pdl": True}
