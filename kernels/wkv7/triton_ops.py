"""The Triton kernels of WKV7 as operators of torch, so that its compiler sees through them.

Importing this module registers `torch.ops.rwkvx.wkv7_*`. Shapes are those of `wkv7`; tensors are
contiguous. M chunks; B of states: sequences.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from rwkvx_kernels.dispatch import facts_of
from rwkvx_kernels.tools.operators import operator
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


def wkv7_triton(tensors: list[Tensor], cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """y [B, T, H, V] and the final state of r, log_decay, k, v, alpha, beta and the state.

    Differentiable. For the backward pass the inputs are kept, and 4·K·V/32 bytes per token and head
    (4·K·V/16 for float32 and for heads of more than 64 channels).
    """
    tensors = [x.contiguous() for x in tensors]
    training = facts_of(*tensors).gradients
    if not training and tensors[0].shape[1] <= STEP_TOKENS:
        return wkv7_step(*tensors, cu_seqlens)
    y, final, _ = wkv7_forward(*tensors, cu_seqlens, training)
    return y, final


def _chunk(r: Tensor, v: Tensor) -> int:
    small = r.dtype == torch.float32 or max(r.shape[3], v.shape[3]) > 64
    return CHUNK_SMALL if small else CHUNK


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


def states_like(r: Tensor, v: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Empty, as what `forward` keeps for the backward pass."""
    batch, tokens = r.shape[:2]
    chunks = batch * triton.cdiv(tokens, _chunk(r, v))
    if cu_seqlens is not None:
        chunks += len(cu_seqlens) - 1
    return state.new_empty(chunks, *state.shape[1:], dtype=torch.float32)


def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    r, _, _, v, _, _, state, cu_seqlens, keep = args
    states = states_like(r, v, state, cu_seqlens) if keep else state.new_empty(0)
    return torch.empty_like(v), torch.empty_like(state), states


def _gradients(grads: list[Tensor], kept: list[Tensor], args: tuple[Any, ...]) -> list[Tensor]:
    *tensors, _, cu_seqlens, _ = args
    return backward(tensors, kept[0], cu_seqlens, *grads)


@operator("wkv7", _fake, _gradients, outputs=2, kept=slice(2, 3))
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
