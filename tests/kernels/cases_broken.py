"""Kernels that `ahead_of_time.py` must refuse, and one that it must not."""

import torch
import triton
import triton.language as tl
from ahead_of_time import Case

from rwkvx_kernels.tools.triton_overlap import overlapping


@triton.jit
def _square(p_x, p_y, SIZE: tl.constexpr):
    o = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    x = tl.load(p_x + o)
    tl.store(p_y + o, tl.dot(x, x))


@triton.jit
def _wrong(p_x, p_y, SIZE: tl.constexpr):
    tl.store(p_y + tl.arange(0, SIZE), tl.load(p_x + tl.arange(0, 2 * SIZE)))


@triton.jit
def _hasty(p_x, p_y, SIZE: tl.constexpr, OVERLAP: tl.constexpr):
    o = tl.arange(0, SIZE)
    tl.store(p_y + o, tl.load(p_x + o).to(tl.float32))


def case(name: str, kernel, size: int, warps: int, overlap: bool = False) -> Case:  # type: ignore[no-untyped-def]
    def call() -> None:
        x = torch.empty(4096, dtype=torch.bfloat16, device="meta")
        y = torch.empty(4096, dtype=torch.float32, device="meta")
        more = overlapping(x.device) if overlap else {}
        kernel[(1,)](x, y, SIZE=size, num_warps=warps, **more)

    return Case(name, call)


CASES = [
    case("right", _square, 16, 1),
    case("greedy", _square, 256, 8),
    case("spilling", _square, 128, 1),
    case("wrong", _wrong, 64, 1),
    case("hasty", _hasty, 64, 1, overlap=True),
]
