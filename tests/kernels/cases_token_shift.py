"""What `ahead_of_time.py` compiles of the token shift: types, one and six mixes, packed or not."""

import torch
from ahead_of_time import Case

from rwkvx_kernels.token_shift.triton_mixes import backward, forward


def case(
    x_type: torch.dtype, weight: torch.dtype, out: torch.dtype, mixes: int, packed: bool
) -> Case:
    def call() -> None:
        x = torch.empty(1, 4096, 1024, dtype=x_type, device="meta")
        previous = torch.empty(2 if packed else 1, 1024, dtype=x_type, device="meta")
        given = [torch.empty(1024, dtype=weight, device="meta")] * mixes
        offsets = torch.empty(3, dtype=torch.int64, device="meta") if packed else None
        made = forward(x, previous, given, offsets, out)
        backward(x, previous, given, offsets, made)

    name = f"{x_type} to {out}, {mixes} mixes, packed {packed}"
    return Case(name, call, x_type == torch.bfloat16 and not packed)


TYPES = [
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16, torch.float16),
    (torch.float32, torch.float32, torch.float32),
    (torch.float32, torch.float32, torch.bfloat16),  # autocast
]
CASES = [case(*t, mixes, packed) for t in TYPES for mixes in (1, 6) for packed in (False, True)]
