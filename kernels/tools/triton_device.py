"""What a Triton launcher needs to know about the device that it launches on."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
import triton


class Device(NamedTuple):
    """A kind of GPU.

    Attributes:
        backend: "cuda" or "hip" (AMD), as Triton names them.
        arch: compute capability (90 for 9.0), or the name of the architecture on AMD.
        warp: threads of a warp.
        shared_bytes: shared memory that one program may use.
        processors: multiprocessors, each of which runs programs of its own.
    """

    backend: str
    arch: int | str
    warp: int
    shared_bytes: int
    processors: int


SM_80 = Device("cuda", 80, 32, 163 * 1024, 108)
SM_90 = Device("cuda", 90, 32, 227 * 1024, 132)
SM_100 = Device("cuda", 100, 32, 227 * 1024, 148)
GFX942 = Device("hip", "gfx942", 64, 64 * 1024, 304)

_pretended: list[Device] = []


@torch.compiler.assume_constant_result
def interpreted() -> bool:
    """Whether Triton's interpreter runs kernels, on tensors of any device (TRITON_INTERPRET=1)."""
    return bool(triton.knobs.runtime.interpret)


@torch.compiler.assume_constant_result
def device_kind(device: torch.device) -> Device:
    """The kind of GPU that `device` is; under the interpreter an sm_90."""
    if _pretended:
        return _pretended[-1]
    return SM_90 if interpreted() else _query(device.index or 0)


@contextmanager
def pretend(device: Device) -> Iterator[None]:
    """Launchers decide as if for `device`: for compiling without having one."""
    _pretended.append(device)
    try:
        yield
    finally:
        _pretended.pop()


@cache
def _query(index: int) -> Device:
    properties: Any = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        arch = properties.gcnArchName.partition(":")[0]
        shared = properties.shared_memory_per_block
        return Device("hip", arch, properties.warp_size, shared, properties.multi_processor_count)
    capability = 10 * properties.major + properties.minor
    shared = properties.shared_memory_per_block_optin
    return Device("cuda", capability, 32, shared, properties.multi_processor_count)
