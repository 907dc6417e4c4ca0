"""What `ahead_of_time.py` compiles of the cross-entropy of a tile of logits."""

import torch
from ahead_of_time import Case

from rwkvx_kernels.linear.triton_entropy import launch


def case(dtype: torch.dtype, rows: int, columns: int) -> Case:
    def call() -> None:
        logits = torch.empty(rows, columns, dtype=dtype, device="meta")
        targets = torch.empty(rows, dtype=torch.int64, device="meta")
        launch(logits, targets, torch.empty(rows, device="meta"))

    return Case(f"{dtype}, {columns} columns", call, dtype == torch.bfloat16)


CASES = [case(d, 4096, 65536) for d in (torch.bfloat16, torch.float16, torch.float32)]
CASES += [case(torch.bfloat16, 4096, 50)]
