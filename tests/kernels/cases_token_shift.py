"""What `ahead_of_time.py` compiles of the token shift: types, one and six mixes, packed or not;
with the layer norm before it, some widths."""

import torch
from ahead_of_time import Case

from rwkvx_kernels.token_shift import triton_norm
from rwkvx_kernels.token_shift.common import Norm
from rwkvx_kernels.token_shift.triton_mixes import backward, forward

TOKENS = 4096


def case(
    types: tuple[torch.dtype, ...], mixes: int, packed: bool, width: int = 1024, norm: bool = False
) -> Case:
    x_type, weight, out = types

    def call() -> None:
        x = torch.empty(1, TOKENS, width, dtype=x_type, device="meta")
        previous = torch.empty(2 if packed else 1, width, dtype=x_type, device="meta")
        vector = torch.empty(width, dtype=weight, device="meta")
        given = [vector] * mixes
        offsets = torch.empty(3, dtype=torch.int64, device="meta") if packed else None
        if norm:
            layer = Norm(vector, vector, 1e-5)
            made = triton_norm.forward(x, previous, layer, given, offsets, out)
            triton_norm.backward(x, previous, layer, given, offsets, made)
        else:
            made = forward(x, previous, given, offsets, out)
            backward(x, previous, given, offsets, made)

    name = f"{x_type} to {out}, {mixes} mixes, packed {packed}"
    if norm:
        name += f", norm of {width}"
    return Case(name, call, x_type == torch.bfloat16 and not packed)


TYPES = [
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16, torch.float16),
    (torch.float32, torch.float32, torch.float32),
    (torch.float32, torch.float32, torch.bfloat16),  # autocast
]
WIDTHS = (256, 512, 768, 2048)
CASES = [
    *(case(t, mixes, packed) for t in TYPES for mixes in (1, 6) for packed in (False, True)),
    *(
        case(t, mixes, packed, width, norm=True)
        for t in TYPES
        for mixes in (1, 6)
        for packed in (False, True)
        for width in WIDTHS
    ),
]
