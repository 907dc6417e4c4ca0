# mypy: allow-untyped-defs, allow-incomplete-defs
"""Losses of logits and, in place of the logits, their gradients: one launch, a row a program.

Names: i_ index, p_ pointer, b_ tile in registers, o_ offset, m_ mask.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvx_kernels.linear.options import TABLE
from rwkvx_kernels.tools.operators import operator
from rwkvx_kernels.tools.sizes import next_power_of_2
from rwkvx_kernels.tools.triton_options import options_for
from rwkvx_kernels.tools.triton_tiles import store


@triton.jit
def _entropy_kernel(p_logits, p_targets, p_weights, p_loss, V, BLOCK: tl.constexpr):
    i_t = tl.program_id(0).to(tl.int64)
    p_row, target = p_logits + i_t * V, tl.load(p_targets + i_t)
    weight = tl.load(p_weights + i_t).to(tl.float32)
    own = tl.load(p_row + target, mask=(target >= 0) & (target < V), other=float("nan"))
    top, total = float("-inf"), 0.0
    for start in range(0, V, BLOCK):
        o_v = start + tl.arange(0, BLOCK)
        b_x = tl.load(p_row + o_v, mask=o_v < V, other=float("-inf")).to(tl.float32)
        highest = tl.maximum(top, tl.max(b_x, axis=0))
        total = total * tl.exp(top - highest) + tl.sum(tl.exp(b_x - highest), axis=0)
        top = highest
    lse = top + tl.log(total)
    tl.store(p_loss + i_t, (lse - own.to(tl.float32)) * weight)
    for start in range(0, V, BLOCK):
        o_v = start + tl.arange(0, BLOCK)
        b_x = tl.load(p_row + o_v, mask=o_v < V, other=float("-inf")).to(tl.float32)
        b_dx = (tl.exp(b_x - lse) - (o_v == target).to(tl.float32)) * weight
        store(p_row, o_v, b_dx, o_v < V)


def launch(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Weighted losses [T] float32 of contiguous logits [T, V], which become their gradients.

    A target that is no column makes its loss NaN.
    """
    rows, columns = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    options = options_for(TABLE, "entropy", logits.dtype, 1, logits.device)
    block = min(options.columns, next_power_of_2(columns))
    if rows:
        args = (logits, targets.contiguous(), weights.contiguous(), losses, columns)
        _entropy_kernel[(rows,)](*args, BLOCK=block, **options.launch)
    return losses


def _fake(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    return torch.empty(len(logits), dtype=torch.float32, device=logits.device)


@operator("losses_and_gradients", _fake, mutates=("logits",))
def losses_and_gradients(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """As `launch`."""
    return launch(logits, targets, weights)
