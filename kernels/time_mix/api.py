"""The public time-mix operation: checks its arguments and chooses an implementation."""

from math import exp

import torch
from torch import Tensor

from rwkvx_kernels.dispatch import resolve_impl
from rwkvx_kernels.time_mix.reference import time_mix_reference

AVAILABLE = ("reference", "cpu")
# Bounds the decay: log_decay = LOG_DECAY_SCALE · sigmoid(·), so a decay is at least exp(-0.6065).
LOG_DECAY_SCALE = -exp(-0.5)


def time_mix(
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    g: Tensor,
    k_k: Tensor,
    k_a: Tensor,
    r_k: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    state: Tensor,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Between the projections of RWKV-7's time mix (arXiv 2503.14456, eq. 4-20), differentiable.

    Key normalisation, removal and replacement keys, the recurrence of `wkv7`, group norm, bonus
    and gate.

    Args:
        r, k, v, a, g: [B, T, C], C = H·N; a in 0 ... 1. Of one dtype.
        log_decay: [B, T, C], <= 0, float32 or that dtype.
        k_k, k_a, norm_weight, norm_bias: [C]. r_k: [H, N]. eps: of the group norm.
        state: [B, H, N, N] float32 (float64 for float64 input), value by key channel; with
            `cu_seqlens`, [sequences, H, N, N].
        cu_seqlens: [sequences + 1] offsets of sequences packed along T, batch size 1.
        impl: "auto", "reference" or "cpu" (compiled; on the CPU, without gradients, else as
            "reference" with the fastest `wkv7`).

    Returns:
        what the output projection reads, [B, T, C] in the dtype of v, and the final state.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if r.dim() != 3 or any(x.shape != r.shape for x in (log_decay, k, v, a, g)):
        shapes = [list(x.shape) for x in (r, log_decay, k, v, a, g)]
        raise ValueError(
            f"r, log_decay, k, v, a and g must be of one shape [B, T, C], got {shapes}"
        )
    heads, size = r_k.shape
    if heads * size != r.shape[-1] or state.shape[1:] != (heads, size, size):
        raise ValueError(
            f"r_k {list(r_k.shape)} and state {list(state.shape)} do not fit C = {r.shape[-1]}"
        )
    impl = resolve_impl(impl, r.device, AVAILABLE)
    tensors = (r, log_decay, k, v, a, g)
    weights = (k_k, k_a, r_k, norm_weight, norm_bias)
    training = torch.is_grad_enabled() and any(x.requires_grad for x in (*tensors, *weights, state))
    compiled = r.device.type == "cpu" and not torch.compiler.is_compiling()
    if impl == "cpu" and not training and compiled and r.numel():
        from rwkvx_kernels.time_mix.cpu_compiled import time_mix_compiled

        return time_mix_compiled(*tensors, *weights, eps, state, cu_seqlens)
    recurrence = "reference" if impl == "reference" else "auto"
    return time_mix_reference(*tensors, *weights, eps, state, cu_seqlens, recurrence)
