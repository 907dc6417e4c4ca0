"""The public time-mix operation: checks its arguments and chooses an implementation."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rwkvx_kernels.dispatch import Choice, Facts, check_packed, facts_of, remembered
from rwkvx_kernels.time_mix.common import TimeMixWeights, recurrence_inputs
from rwkvx_kernels.time_mix.reference import time_mix_reference
from rwkvx_kernels.time_mix.torch_form import time_mix_torch
from rwkvx_kernels.tools.operators import operator
from rwkvx_kernels.wkv7 import Summary, wkv7_summary
from rwkvx_kernels.wkv7 import api as recurrence


@remembered
def choose(facts: Facts, head_size: int = 64, impl: str = "auto") -> Choice:
    """Which implementation `time_mix` runs: each can what that of its recurrence can, whose table
    of launch options has rows for no other heads and GPUs than the one here."""
    return recurrence.choose(facts, (head_size, head_size), impl)


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
        r, w, k, v, a, g: [B, T, C], C = H·D, of one dtype; w and a before their bias and
            activation.
        residual: the gate of the value residual before bias and activation, and the values of the
            first block, [B, T, C]; None in that block.
        weights: see `TimeMixWeights`. eps: of the group norm.
        state: [B, H, D, D] float32 (float64 for float64 input), value by key channel; with
            `cu_seqlens`, [sequences, H, D, D].
        cu_seqlens: [sequences + 1] offsets of sequences packed along T, batch size 1. Triton
            kernels do not look at them beforehand, which would wait for the GPU.
        impl: "auto", "reference", "torch", "compiled" (Numba, on a CPU; with gradients, the
            recurrence alone) or "triton" (what `wkv7` says of them holds).

    Returns:
        what the output projection reads, [B, T, C] in the dtype of v, and the final state.

    Raises:
        ValueError: shapes that do not fit together.
        UnsupportedError: an implementation asked for by name that cannot do this.
    """
    tokens = (r, w, k, v, a, g, *(residual or ()))
    rows = len(r) if cu_seqlens is None else check_packed(cu_seqlens, len(r))
    size = _check(tokens, weights, state, rows)
    every = weights.tensors()
    facts = facts_of(*tokens, *every, state)
    impl = choose(facts, size, impl).impl
    if not r.numel():
        return v.new_empty(v.shape), state
    if impl == "triton":
        from rwkvx_kernels.time_mix.triton_ops import time_mix_triton  # Triton may be missing

        return time_mix_triton(list(tokens), every, eps, state, cu_seqlens, facts.gradients)
    if impl == "reference":
        return time_mix_reference(tokens, weights, eps, state, cu_seqlens)
    if impl == "compiled" and not facts.gradients:
        form = _traced if facts.traced else _compiled
        y, final = form(list(tokens), every, eps, state, cu_seqlens)
        return y, final
    return time_mix_torch(tokens, weights, eps, state, cu_seqlens, impl)


def time_mix_summary(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    residual: tuple[Tensor, Tensor] | None,
    weights: TimeMixWeights,
    impl: str = "auto",
) -> Summary:
    """What these tokens do to the state of `time_mix`: P and D of `wkv7_summary`, differentiable.

    Arguments as for `time_mix`.
    """
    tokens = (r, w, k, v, a, *(residual or ()))
    _, log_decay, k, v, alpha, beta = recurrence_inputs(tokens, weights)
    return wkv7_summary(log_decay, k, v, alpha, beta, impl=impl)


def _compiled(
    tokens: list[Tensor],
    weights: list[Tensor],
    eps: float,
    state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    from rwkvx_kernels.time_mix.numba_scan import time_mix_compiled  # takes half a second

    return time_mix_compiled(tokens, weights, eps, state, cu_seqlens)


def _fake(tokens: list[Tensor], _: Any, __: Any, state: Tensor, *___: Any) -> tuple[Tensor, Tensor]:
    return tokens[3].new_empty(tokens[3].shape), state.new_empty(state.shape)


_traced = operator("time_mix_compiled", _fake)(_compiled)


def _check(tokens: Sequence[Tensor], weights: TimeMixWeights, state: Tensor, rows: int) -> int:
    """The size of a head."""
    r, (heads, size) = tokens[0], weights.r_k.shape
    if r.dim() != 3 or any(x.shape != r.shape for x in tokens):
        shapes = [list(x.shape) for x in tokens]
        raise ValueError(f"r, w, k, v, a, g must be of one shape [B, T, C], got {shapes}")
    if heads * size != r.shape[-1] or state.shape[1:] != (heads, size, size):
        raise ValueError(
            f"r_k {[heads, size]} and state {list(state.shape)} do not fit C = {r.shape[-1]}"
        )
    if (len(tokens) == 8) != (weights.v0 is not None):
        raise ValueError("a value residual needs v0, and v0 a value residual")
    if len(state) != rows:
        raise ValueError(f"a state of {len(state)} sequences, but there are {rows}")
    wanted = torch.float64 if r.dtype == torch.float64 else torch.float32
    if state.dtype != wanted:
        raise ValueError(f"the state of {r.dtype} tokens must be {wanted}, it is {state.dtype}")
    return size
