# mypy: allow-untyped-defs, allow-incomplete-defs
"""Products of matrices on tensor cores, in the precision that what they are for needs.

"bf16": one product of factors rounded to 8 bits. "bf16x3": factors as sums of two such numbers (16
bits), three products, half as fast again as one of tf32 (11 bits). Any other: as Triton names it.
What is rounded is the same under the interpreter, which cannot multiply bfloat16.
"""

import torch
import triton
import triton.language as tl

from rwkvx_kernels.dispatch import INTERPRETED
from rwkvx_kernels.tools.triton_tiles import precision

EMULATED: tl.constexpr = tl.constexpr(INTERPRETED)


def precisions(dtype: torch.dtype, device: torch.device) -> tuple[str, str]:
    """Of products whose errors stay (in a state), and of those that are rounded to `dtype` next."""
    if dtype == torch.float32:
        exact = precision(dtype, device)
        return exact, exact
    return "bf16x3", "bf16" if dtype == torch.bfloat16 else "bf16x3"


@triton.jit
def narrow(b_x):
    """Rounded to bfloat16; under the interpreter, in float32."""
    if EMULATED:
        b_bits = b_x.to(tl.float32).to(tl.uint32, bitcast=True)
        b_bits = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) & 0xFFFF0000
        return b_bits.to(tl.uint32).to(tl.float32, bitcast=True)
    else:
        return b_x.to(tl.bfloat16)


@triton.jit
def load_exact(p_x, o_x, m_x):
    """In float32, but bfloat16 as it is: `product` then knows that it has 8 bits."""
    b_x = tl.load(p_x + o_x, mask=m_x, other=0.0)
    if b_x.dtype != tl.bfloat16:
        b_x = b_x.to(tl.float32)
    return b_x


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a b, summed in float32; factors are float32, or bfloat16."""
    if PRECISION == "bf16":
        return tl.dot(narrow(a), narrow(b))
    elif PRECISION == "bf16x3":
        a_high, b_high = narrow(a), narrow(b)
        b_sum = tl.zeros((a.shape[0], b.shape[1]), tl.float32)
        if a.dtype == tl.float32:
            b_sum = tl.dot(narrow(a - a_high.to(tl.float32)), b_high, b_sum)
        if b.dtype == tl.float32:
            b_sum = tl.dot(a_high, narrow(b - b_high.to(tl.float32)), b_sum)
        return tl.dot(a_high, b_high, b_sum)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)
