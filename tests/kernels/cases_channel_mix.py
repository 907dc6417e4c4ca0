"""What `ahead_of_time.py` compiles of the squared ReLU: every type, and more than 2^31 elements."""

import torch
from ahead_of_time import Case

from rwkvx_kernels.channel_mix.triton_relu import backward, forward


def case(dtype: torch.dtype, rows: int) -> Case:
    def call() -> None:
        x = torch.empty(rows, 4096, dtype=dtype, device="meta")
        backward(x, forward(x))

    return Case(f"{dtype}, {rows} rows", call, dtype == torch.bfloat16)


CASES = [case(d, 4096) for d in (torch.bfloat16, torch.float16, torch.float32)]
CASES += [case(torch.bfloat16, 2**20)]
