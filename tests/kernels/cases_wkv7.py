"""What `ahead_of_time.py` compiles of WKV7: every type, the head sizes at both ends and between."""

import torch
from ahead_of_time import Case

from rwkvx_kernels.wkv7.triton_ops import backward, forward
from rwkvx_kernels.wkv7.triton_step import step

# Loads and stores; two programs a multiprocessor in the place of one, and three stages of loads: on
# an H200 0.80 and 0.96 of the time of forward and backward pass.
SPILLS = {"_keys_kernel": 170, "_carry_kernel": 30, "_segment_kernel": 10, "_summary_kernel": 10}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SIZES = {
    "bfloat16": [(64, 64), (128, 128), (16, 16), (24, 40), (128, 16), (16, 128)],
    "float16": [(64, 64), (128, 128), (16, 24)],
    "float32": [(64, 64), (128, 128), (24, 40)],
}
PACKED = [("bfloat16", 64, 64), ("float32", 128, 128)]


def case(dtype: str, key: int, value: int, packed: bool) -> Case:
    def call() -> None:
        def tokens(width: int) -> torch.Tensor:
            return torch.empty(1, 4096, 16, width, dtype=DTYPES[dtype], device="meta")

        keys, values = tokens(key), tokens(value)
        state = torch.empty(2 if packed else 1, 16, value, key, device="meta")
        offsets = torch.empty(3, dtype=torch.int64, device="meta") if packed else None
        tensors = [keys, keys.float(), keys, values, keys, keys]
        step(*tensors, state, offsets)
        forward(tensors, state, offsets, keep=False)
        _, final, *kept = forward(tensors, state, offsets, keep=True)
        backward(tensors, kept, offsets, values, final)

    name = f"{dtype}, K {key}, V {value}{', packed' if packed else ''}"
    quick = dtype == "bfloat16" and not packed and key == value == 64
    return Case(name, call, quick)


CASES = [case(d, k, v, False) for d, sizes in SIZES.items() for k, v in sizes]
CASES += [case(*shape, True) for shape in PACKED]
