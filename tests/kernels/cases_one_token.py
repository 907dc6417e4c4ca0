"""What `ahead_of_time.py` compiles of one token through blocks."""

import torch
from ahead_of_time import Case

from rwkvx_kernels.one_token import BlockWeights, Memory, embed, logits, read_block

RANKS = (64, 64, 32, 128)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def weights(
    dtype: torch.dtype, width: int, size: int, first: bool = False, int8: bool = False
) -> BlockWeights:
    """Of an RWKV-7 block; int8: of its matrices."""
    kind = torch.int8 if int8 else dtype
    vector = empty(width, dtype=dtype)
    scale = empty(width) if int8 else None
    inner = 4 * width
    factors = [(empty(width, r, dtype=dtype), empty(r, width, dtype=dtype)) for r in RANKS]
    if first:
        factors[2] = (None, None)
    return BlockWeights(
        heads=width // size,
        eps=(1e-5,) * 3,
        ln1=(vector, vector),
        ln2=(vector, vector),
        channel=(vector, empty(inner, width, dtype=kind), empty(width, inner, dtype=kind)),
        channel_scales=(empty(inner), scale) if int8 else (None, None),
        mixes=(vector,) * 6,
        matrices=(empty(width, width, dtype=kind),) * 4,
        scales=(scale,) * 4,
        down=tuple(down for down, _ in factors),
        up=tuple(up for _, up in factors),
        vectors=(*[vector] * 2, None if first else vector, *[vector] * 5),
    )


def memory(dtype: torch.dtype, rows: int, width: int, size: int) -> Memory:
    shift = empty(rows, width, dtype=dtype)
    return Memory(shift, empty(rows, width // size, size, size), shift, None)


def case(
    dtype: torch.dtype, rows: int, width: int, size: int, int8: bool = False, quick: bool = False
) -> Case:
    def call() -> None:
        x = empty(rows, width)
        for first in (True, False):
            own = weights(dtype, width, size, first, int8)
            read_block(x, x, own, memory(dtype, rows, width, size))
        norm = (*own.ln1, 1e-5)
        embed(empty(rows, dtype=torch.int64), empty(65536, width, dtype=dtype), norm)
        head = empty(65536, width, dtype=torch.int8 if int8 else dtype)
        logits(x, norm, head, empty(65536) if int8 else None, dtype)

    words = f"{dtype}, int8 {int8}, rows {rows}, C {width}, N {size}"
    return Case(words.replace("torch.", ""), call, quick)


CASES = [case(torch.bfloat16, n, 768, 64, quick=True) for n in (1, 32)]
CASES += [case(torch.bfloat16, n, 2048, 64, int8) for n in (1, 16) for int8 in (False, True)]
CASES += [case(d, n, 768, 64) for d in (torch.float16, torch.float32) for n in (1, 16, 64)]
CASES += [case(torch.bfloat16, n, 240, 40) for n in (1, 16)]
CASES += [case(torch.float32, n, 1024, 128, int8) for n in (1, 64) for int8 in (False, True)]
