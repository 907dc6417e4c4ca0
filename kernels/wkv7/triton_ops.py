"""The Triton kernels of WKV7 as operators of torch, so that its compiler sees through them.

Importing this module registers `torch.ops.rwkvx.wkv7_*`. Each has a fake implementation, which
only says what comes out. Shapes are those of `wkv7`; tensors are contiguous. N sequences,
M chunks.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from rwkvx_kernels.wkv7.triton_chunk import lay_out
from rwkvx_kernels.wkv7.triton_gradients import gradients
from rwkvx_kernels.wkv7.triton_prepare import prepare
from rwkvx_kernels.wkv7.triton_scan import scan
from rwkvx_kernels.wkv7.triton_step import step

# Tokens of a chunk; fewer where exact products of float32, or heads of more than 64 channels, take
# the registers.
CHUNK, CHUNK_SMALL = 32, 16
# Up to so many tokens the recurrence itself costs less than chunks do.
STEP_TOKENS = 8


def wkv7_triton(
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    beta: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y [B, T, H, V] and the final state, differentiable in every floating argument.

    For the backward pass the inputs are kept, and 4·K·V/32 bytes per token and head (4·K·V/16 for
    float32 and for heads of more than 64 channels).
    """
    tensors = [x.contiguous() for x in (r, log_decay, k, v, alpha, beta, state)]
    training = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if not training and r.shape[1] <= STEP_TOKENS:
        return wkv7_step(*tensors, cu_seqlens)
    y, final, _ = wkv7_forward(*tensors, cu_seqlens, training)
    return y, final


def _chunk(r: Tensor, v: Tensor) -> int:
    small = r.dtype == torch.float32 or max(r.shape[3], v.shape[3]) > 64
    return CHUNK_SMALL if small else CHUNK


@torch.library.custom_op("rwkvx::wkv7_step", mutates_args=())
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


@wkv7_step.register_fake
def _(
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    beta: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(v), torch.empty_like(state)


def forward(
    tensors: list[Tensor], state: Tensor, cu_seqlens: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final states, and the states before each chunk [M, H, V, K] (empty unless `keep`)."""
    chunk = _chunk(tensors[0], tensors[3])
    batch, tokens = tensors[0].shape[:2]
    layout = lay_out(batch, tokens, cu_seqlens, chunk)
    prepared = prepare(tensors, layout, chunk, None)
    final = scan(prepared, state, layout, chunk, tensors[0], keep)
    assert prepared.y is not None
    return prepared.y, final, prepared.d if keep else prepared.d.new_empty(0)


def backward(
    tensors: list[Tensor],
    states: Tensor,
    cu_seqlens: Tensor | None,
    dy: Tensor,
    dfinal: Tensor,
) -> list[Tensor]:
    """Gradients of r, log_decay, k, v, alpha, beta and of the initial state."""
    chunk = _chunk(tensors[0], tensors[3])
    batch, tokens = tensors[0].shape[:2]
    layout = lay_out(batch, tokens, cu_seqlens, chunk)
    prepared = prepare(tensors, layout, chunk, dy)
    dstate = scan(prepared, dfinal, layout, chunk, tensors[0], True)
    return [*gradients(tensors, dy, states, prepared.d, layout, chunk), dstate]


@torch.library.custom_op("rwkvx::wkv7_forward", mutates_args=())
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
) -> tuple[Tensor, Tensor, Tensor]:
    """In chunks: what `forward` says."""
    return forward([r, log_decay, k, v, alpha, beta], state, cu_seqlens, keep)


@wkv7_forward.register_fake
def _(
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    beta: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    states = fake_states(r, v, state, cu_seqlens) if keep else state.new_empty(0)
    return torch.empty_like(v), torch.empty_like(state), states


def fake_states(r: Tensor, v: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """As what `forward` keeps for the backward pass."""
    batch, tokens = r.shape[:2]
    chunks = batch * triton.cdiv(tokens, _chunk(r, v))
    if cu_seqlens is not None:
        chunks += len(cu_seqlens) - 1
    return state.new_empty(chunks, *state.shape[1:], dtype=torch.float32)


@torch.library.custom_op("rwkvx::wkv7_backward", mutates_args=())
def wkv7_backward(
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    beta: Tensor,
    states: Tensor,
    cu_seqlens: Tensor | None,
    dy: Tensor,
    dfinal: Tensor,
) -> list[Tensor]:
    """In chunks: what `backward` says."""
    return backward([r, log_decay, k, v, alpha, beta], states, cu_seqlens, dy, dfinal)


@wkv7_backward.register_fake
def _(
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    beta: Tensor,
    states: Tensor,
    cu_seqlens: Tensor | None,
    dy: Tensor,
    dfinal: Tensor,
) -> list[Tensor]:
    return [torch.empty_like(x) for x in (r, log_decay, k, v, alpha, beta, dfinal)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, _, cu_seqlens, _ = inputs
    ctx.set_materialize_grads(False)  # zeros for the states would cost as much as they do
    ctx.save_for_backward(*tensors, *output[1:], cu_seqlens)


def _differentiate(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: Any) -> tuple[Any, ...]:
    *tensors, final, states, cu_seqlens = ctx.saved_tensors
    dy = torch.zeros_like(tensors[3]) if dy is None else dy.contiguous()
    dfinal = torch.zeros_like(final) if dfinal is None else dfinal.contiguous()
    grads = wkv7_backward(*tensors, states, cu_seqlens, dy, dfinal)
    return (*grads, None, None)


wkv7_forward.register_autograd(_differentiate, setup_context=_save)
