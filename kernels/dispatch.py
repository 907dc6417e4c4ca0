"""Choosing an implementation, the same way for every kernel family."""

import os
from collections.abc import Callable
from functools import wraps
from importlib.util import find_spec
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

HAS_TRITON = find_spec("triton") is not None
IMPLEMENTATIONS = ("reference", "cpu", "triton")


def resolve_impl(
    impl: str,
    device: torch.device,
    available: tuple[str, ...],
    dtype: torch.dtype = torch.float32,
) -> str:
    """Name the implementation that `impl` stands for on `device`.

    Args:
        impl: "auto" or one of `IMPLEMENTATIONS`. An explicit request is never replaced by another.
        device: where the tensors are.
        available: the implementations that this family has.
        dtype: of the tensors; Triton kernels have no float64.

    Raises:
        ValueError: an unknown name; Triton kernels for tensors that are not on a GPU, for float64.
        ModuleNotFoundError: Triton kernels without Triton.
        NotImplementedError: a known implementation that this family does not have yet.
    """
    if impl == "auto":
        # The "cpu" form is plain torch: it is also the fastest that runs on a GPU without Triton.
        there = device.type == "cuda" and "triton" in available and HAS_TRITON
        return "triton" if there and dtype != torch.float64 else "cpu"
    if impl not in IMPLEMENTATIONS:
        known = ", ".join(("auto", *IMPLEMENTATIONS))
        raise ValueError(f"unknown impl {impl!r}: choose one of {known}")
    if impl not in available:
        raise NotImplementedError(
            f'impl="{impl}" is not there yet for this kernel; available: {", ".join(available)}'
        )
    if impl == "triton":
        _check_triton(device)
        if dtype == torch.float64:
            raise ValueError('impl="triton" has no float64')
    return impl


def _check_triton(device: torch.device) -> None:
    if not HAS_TRITON:
        raise ModuleNotFoundError(
            'impl="triton" needs the package triton: pip install "rwkvx[gpu]"', name="triton"
        )
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f'impl="triton" needs tensors on a GPU, these are on {device.type} (slowly, for tests, '
            "Triton's interpreter runs there when TRITON_INTERPRET=1 is set from the start)"
        )


def check_cu_seqlens(cu_seqlens: torch.Tensor, batch: int, tokens: int) -> list[int]:
    """Validate packed-sequence offsets and return them as a list.

    Args:
        cu_seqlens: [sequences + 1], integer, starts at 0, never decreases, ends at `tokens`.
        batch: batch size of the packed tensors, which must be 1.
        tokens: packed length T.

    Raises:
        ValueError: offsets that do not describe `tokens` packed tokens.
    """
    check_packed(cu_seqlens, batch)
    offsets = [int(o) for o in cu_seqlens.tolist()]
    if offsets[0] != 0 or offsets[-1] != tokens or offsets != sorted(offsets):
        raise ValueError(f"cu_seqlens must rise from 0 to T = {tokens}, got {offsets[:8]}")
    return offsets


def check_packed(cu_seqlens: Tensor, batch: int) -> int:
    """Validate what can be seen of packed-sequence offsets without a look at them.

    Returns:
        the number of sequences.

    Raises:
        ValueError: no 1-D tensor of integers; a batch size other than 1.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point() or len(cu_seqlens) < 1:
        raise ValueError("cu_seqlens must be a 1-D integer tensor of sequence offsets")
    if batch != 1:
        raise ValueError(f"packed sequences need batch size 1, got {batch}")
    return len(cu_seqlens) - 1


def autocast_dtype(x: Tensor) -> torch.dtype:
    """What a product would read `x` as: under `torch.autocast` the narrower dtype."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def without_autocast(operation: Callable[P, R]) -> Callable[P, R]:
    """Run an operation in the dtypes it chose itself, also inside `torch.autocast`."""

    @wraps(operation)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        device = next((x.device.type for x in tensors), "cpu")
        with torch.autocast(device, enabled=False):
            return operation(*args, **kwargs)

    return run


class Choice(NamedTuple):
    """What runs, and why."""

    impl: str
    why: str
