"""Packed sequences, one after the other, as one operator: their offsets need not be known to trace.

Importing this module registers `torch.ops.rwkvx.chunk_attention_packed*`. Arguments and results are
those of the operators for whole sequences, with the offsets after the tensors.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rwkvx_kernels.chunk_attention.triton_ops import (
    chunk_attention,
    chunk_attention_backward,
    outputs_like,
)
from rwkvx_kernels.dispatch import check_cu_seqlens


def _parts(cu_seqlens: Tensor, *tensors: Tensor) -> list[list[Tensor]]:
    """The tensors [1, T, ...] of each sequence that has a token."""
    offsets = check_cu_seqlens(cu_seqlens, *tensors[0].shape[:2])
    bounds = [(a, b) for a, b in pairwise(offsets) if a < b]
    return [[x[:, a:b].contiguous() for x in tensors] for a, b in bounds]


@torch.library.custom_op("rwkvx::chunk_attention_packed", mutates_args=())
def chunk_attention_packed(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, chunk_size: int, topk: int, coarse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """o, log-sum-exp and chosen chunks, these counted from the start of each sequence."""
    parts = _parts(cu_seqlens, q, k, v)
    done = [chunk_attention(*part, chunk_size, topk, coarse) for part in parts]
    o, lse, chosen = (torch.cat(x, dim=1) for x in zip(*done, strict=True))
    return o, lse, chosen


@chunk_attention_packed.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, chunk_size: int, topk: int, coarse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return outputs_like(q, topk)


@torch.library.custom_op("rwkvx::chunk_attention_packed_backward", mutates_args=())
def chunk_attention_packed_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    chosen: Tensor,
    cu_seqlens: Tensor,
    chunk_size: int,
    topk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the dtype of q."""
    parts = _parts(cu_seqlens, do, q, k, v, o, lse, chosen)
    done = [chunk_attention_backward(*part, chunk_size, topk) for part in parts]
    dq, dk, dv = (torch.cat(x, dim=1) for x in zip(*done, strict=True))
    return dq, dk, dv


@chunk_attention_packed_backward.register_fake
def _(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    chosen: Tensor,
    cu_seqlens: Tensor,
    chunk_size: int,
    topk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, *ctx.sizes = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)
    ctx.mark_non_differentiable(output[1], output[2])


def _gradients(ctx: Any, do: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    grads = chunk_attention_packed_backward(do.contiguous(), *ctx.saved_tensors, *ctx.sizes[:2])
    return (*grads, None, None, None, None)


chunk_attention_packed.register_autograd(_gradients, setup_context=_save)
