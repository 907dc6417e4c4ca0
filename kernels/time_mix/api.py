"""The public time-mix operation: checks its arguments and chooses an implementation."""

from math import exp
from typing import NamedTuple

import torch
from torch import Tensor

from rwkvx_kernels.dispatch import check_packed
from rwkvx_kernels.time_mix.reference import gates, time_mix_reference
from rwkvx_kernels.wkv7.api import chosen_impl

# Bounds the decay: log_decay = LOG_DECAY_SCALE · sigmoid(·), so a decay is at least exp(-0.6065).
LOG_DECAY_SCALE = -exp(-0.5)


class TimeMixWeights(NamedTuple):
    """The vectors of a time mix: [C] each, r_k [H, N]; v0 is None without a value residual."""

    w0: Tensor
    a0: Tensor
    v0: Tensor | None
    k_k: Tensor
    k_a: Tensor
    r_k: Tensor
    norm_weight: Tensor
    norm_bias: Tensor

    def tensors(self) -> list[Tensor]:
        """Those that are there, v0 last."""
        return [x for x in (*self[:2], *self[3:], self.v0) if x is not None]


def time_mix(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    g: Tensor,
    residual: tuple[Tensor, Tensor] | None,
    weights: TimeMixWeights,
    eps: float,
    state: Tensor,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Between the projections of RWKV-7's time mix (arXiv 2503.14456, eq. 4-20), differentiable.

    Decay, gates, value residual, keys, the recurrence of `wkv7`, group norm, bonus and gate.

    Args:
        r, w, k, v, a, g: [B, T, C], C = H·N, of one dtype; w and a before their bias and
            activation.
        residual: the gate of the value residual before bias and activation, and the values of the
            first block, [B, T, C]; None in that block.
        weights: see `TimeMixWeights`. eps: of the group norm.
        state: [B, H, N, N] float32 (float64 for float64 input), value by key channel; with
            `cu_seqlens`, [sequences, H, N, N].
        cu_seqlens: [sequences + 1] offsets of sequences packed along T, batch size 1. Triton
            kernels do not look at them beforehand, which would wait for the GPU.
        impl: "auto", "reference", "cpu" (compiled; on the CPU, without gradients, else as
            "reference" with the fastest `wkv7`) or "triton" (what `wkv7` says of it holds).

    Returns:
        what the output projection reads, [B, T, C] in the dtype of v, and the final state.

    Raises:
        ValueError: shapes that do not fit together; Triton kernels for what they do not have.
    """
    tokens = (r, w, k, v, a, g, *(residual or ()))
    if r.dim() != 3 or any(x.shape != r.shape for x in tokens):
        shapes = [list(x.shape) for x in tokens]
        raise ValueError(f"r, w, k, v, a, g must be of one shape [B, T, C], got {shapes}")
    size = _check(weights, state, r.shape[-1], residual is not None)
    impl = chosen_impl(r.device, impl, r.dtype, (size, size))
    every = weights.tensors()
    training = torch.is_grad_enabled() and any(x.requires_grad for x in (*tokens, *every, state))
    if impl == "triton" and r.numel():
        from rwkvx_kernels.time_mix.triton_ops import time_mix_triton  # Triton may be missing

        rows = len(r) if cu_seqlens is None else check_packed(cu_seqlens, len(r))
        if len(state) != rows:
            raise ValueError(f"a state of {len(state)} sequences, but there are {rows}")
        return time_mix_triton(list(tokens), every, eps, state, cu_seqlens, training)
    compiled = r.is_cpu and not torch.compiler.is_compiling() and r.numel()
    if impl == "cpu" and not training and compiled:
        from rwkvx_kernels.time_mix.cpu_compiled import time_mix_compiled

        return time_mix_compiled(tokens, weights, (LOG_DECAY_SCALE, eps), state, cu_seqlens)
    gated = gates(w, v, a, residual, weights, LOG_DECAY_SCALE)
    inputs = (r, *gated, k, g, *weights[3:], eps, state, cu_seqlens)
    return time_mix_reference(*inputs, "reference" if impl == "reference" else "auto")


def _check(weights: TimeMixWeights, state: Tensor, width: int, residual: bool) -> int:
    """The size of a head."""
    heads, size = weights.r_k.shape
    if heads * size != width or state.shape[1:] != (heads, size, size):
        raise ValueError(
            f"r_k {[heads, size]} and state {list(state.shape)} do not fit C = {width}"
        )
    if residual != (weights.v0 is not None):
        raise ValueError("a value residual needs v0, and v0 a value residual")
    return size
