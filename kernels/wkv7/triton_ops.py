"""The Triton kernels of WKV7 as operators of torch, so that its compiler sees through them.

Importing this module registers `torch.ops.rwkvx.wkv7_*`. Shapes are those of `wkv7`; tensors are
contiguous. M chunks; B of states: sequences.
"""

from typing import Any

import torch
from torch import Tensor

from rwkvx_kernels.dispatch import facts_of
from rwkvx_kernels.tools.operators import operator
from rwkvx_kernels.wkv7.triton_carry import carry
from rwkvx_kernels.wkv7.triton_chunk import lay_out, make_plan
from rwkvx_kernels.wkv7.triton_gradients import gradients
from rwkvx_kernels.wkv7.triton_segments import Run, run, states_like
from rwkvx_kernels.wkv7.triton_step import step

# Up to so many tokens the recurrence itself costs less than chunks do.
STEP_TOKENS = 8


def wkv7_triton(tensors: list[Tensor], cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """y [B, T, H, V] and the final state of r, log_decay, k, v, alpha, beta and the state.

    Differentiable. For the backward pass the inputs are kept, U (as large as v), and 2·K·V/64 bytes
    per token and head (4·K·V/64 for float16; 4·K·V/16 for float32 and for heads of more than 64
    channels).
    """
    tensors = [x.contiguous() for x in tensors]
    training = facts_of(*tensors).gradients
    if not training and tensors[0].shape[1] <= STEP_TOKENS:
        return wkv7_step(*tensors, cu_seqlens)
    y, final, *_ = wkv7_forward(*tensors, cu_seqlens, training)
    return y, final


def forward(tensors: list[Tensor], state: Tensor, cu_seqlens: Tensor | None, keep: bool) -> Run:
    """y, the final states and, with `keep`, what `backward` needs."""
    plan = make_plan(tensors[0], tensors[3], cu_seqlens)
    return run(tensors, state, lay_out(plan, cu_seqlens), keep)


def backward(
    tensors: list[Tensor],
    kept: list[Tensor],
    cu_seqlens: Tensor | None,
    dy: Tensor,
    dfinal: Tensor,
) -> list[Tensor]:
    """Gradients of r, log_decay, k, v, alpha, beta and of the initial state.

    kept: states, U and P of `forward`.
    """
    plan = make_plan(tensors[0], tensors[3], cu_seqlens)
    layout, (states, u, p) = lay_out(plan, cu_seqlens), kept
    dstate, dstates, x, dv = carry(tensors, dy, dfinal, p, layout)
    dr, dlog_decay, dk, dalpha, dbeta = gradients(tensors, dy, u, x, states, dstates, layout)
    return [dr, dlog_decay, dk, dv, dalpha, dbeta, dstate]


def kept_like(r: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> list[Tensor]:
    """Empty, as what `forward` keeps for the backward pass."""
    plan, (heads, key) = make_plan(r, v, cu_seqlens), r.shape[2:]
    shape = (plan.segments, heads, key, key) if plan.split else (0,)
    return [states_like(r, v, plan), torch.empty_like(v), r.new_empty(shape, dtype=torch.float32)]


def _fake(*args: Any) -> tuple[Tensor, ...]:
    r, _, _, v, _, _, state, cu_seqlens, keep = args
    kept = kept_like(r, v, cu_seqlens) if keep else [state.new_empty(0) for _ in range(3)]
    return torch.empty_like(v), torch.empty_like(state), *kept


def _gradients(grads: list[Tensor], kept: list[Tensor], args: tuple[Any, ...]) -> list[Tensor]:
    *tensors, _, cu_seqlens, _ = args
    return backward(tensors, kept, cu_seqlens, *grads)


@operator("wkv7", _fake, _gradients, outputs=2, kept=slice(2, 5))
def wkv7_forward(
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    beta: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """In chunks: what `forward` says."""
    y, final, states, u, p = forward([r, log_decay, k, v, alpha, beta], state, cu_seqlens, keep)
    if states is None or u is None:
        return y, final, state.new_empty(0), state.new_empty(0), state.new_empty(0)
    return y, final, states, u, p


@operator("wkv7_step", lambda *args: _fake(*args, False)[:2])
def wkv7_step(
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    beta: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Token by token, without a gradient: y and the final state."""
    return step(r, log_decay, k, v, alpha, beta, state, cu_seqlens)
