"""What `ahead_of_time.py` compiles of the time mix: types, head sizes, value residual or none."""

import torch
from ahead_of_time import Case

from rwkvx_kernels.time_mix import triton_finish, triton_keys
from rwkvx_kernels.time_mix.triton_step import step

HEADS = 16


def case(dtype: torch.dtype, size: int, residual: bool, packed: bool) -> Case:
    """Inputs and weights of one dtype, as under autocast weights of float32 too."""

    def call() -> None:
        for weight_dtype in {dtype, torch.float32}:
            _call(dtype, weight_dtype, size, residual, packed)

    name = f"{dtype}, N {size}, residual {residual}, packed {packed}"
    return Case(name, call, dtype == torch.bfloat16 and size == 64 and residual)


def _call(
    dtype: torch.dtype, weight_dtype: torch.dtype, size: int, residual: bool, packed: bool
) -> None:
    def token(kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(1, 4096, HEADS * size, dtype=kind, device="meta")

    w = torch.empty(HEADS * size, dtype=weight_dtype, device="meta")
    r_k = w.view(HEADS, size)
    x, bonus = token(), torch.empty(1, 4096, HEADS, device="meta")
    state = torch.empty(2 if packed else 1, HEADS, size, size, device="meta")
    offsets = torch.empty(3, dtype=torch.int64, device="meta") if packed else None
    more = [x, x] if residual else []
    own = [w] * (5 if residual else 4)
    step([x] * 6, more, [*own[:4], r_k, w, w, w], 1e-5, state, offsets)
    triton_keys.prepare([x] * 4, more, own, HEADS)
    later = [bonus, x, x, token(torch.float32), x, x, x, x]
    triton_keys.gradients([x] * 5, more, own, r_k, later)
    triton_finish.finish([x] * 5, [r_k, w, w], 1e-5)
    triton_finish.gradients(x, [x] * 5, [r_k, w, w], 1e-5)


SIZES = [(torch.bfloat16, n) for n in (64, 128, 16, 40)]
SIZES += [(torch.float16, 64), (torch.float32, 64), (torch.float32, 128)]
CASES = [case(d, n, residual, False) for d, n in SIZES for residual in (True, False)]
CASES += [case(torch.bfloat16, 64, True, True)]
