"""What `ahead_of_time.py` compiles of WKV7."""

import torch
from ahead_of_time import Case

from rwkvx_kernels.wkv7.triton_step import step

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SIZES = [(16, 16), (24, 40), (64, 64), (64, 128), (128, 128)]


def case(dtype: str, key: int, value: int, packed: bool) -> Case:
    def call() -> None:
        def tokens(width: int) -> torch.Tensor:
            return torch.empty(1, 4096, 16, width, dtype=DTYPES[dtype], device="meta")

        keys, values = tokens(key), tokens(value)
        state = torch.empty(2, 16, value, key, device="meta")
        offsets = torch.empty(3, dtype=torch.int64, device="meta") if packed else None
        step(keys, keys.float(), keys, values, keys, keys, state, offsets)

    name = f"{dtype} K {key} V {value}{' packed' if packed else ''}"
    return Case(name, call, quick=(key, value) in ((64, 64), (128, 128)) and dtype == "bfloat16")


CASES = [case(d, k, v, p) for d in DTYPES for k, v in SIZES for p in (False, True)]
