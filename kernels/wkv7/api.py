"""The public WKV7 operation: checks its arguments, chooses an implementation and calls it."""

from itertools import pairwise

import torch
from torch import Tensor

from rwkvx_kernels.dispatch import (
    Choice,
    Facts,
    check_cu_seqlens,
    compiled_lacks,
    decide,
    facts_of,
    remembered,
    triton_lacks,
    without_autocast,
)
from rwkvx_kernels.tools.operators import opaque
from rwkvx_kernels.wkv7.reference import wkv7_reference
from rwkvx_kernels.wkv7.torch_form import wkv7_torch

# Channels of a head that the Triton kernels have.
LEAST_SIZE, MOST_SIZE = 16, 128
# Key channels that the compiled gradients do together.
GRADIENT_KEYS = 32


@remembered
def choose(facts: Facts, head_sizes: tuple[int, int] = (64, 64), impl: str = "auto") -> Choice:
    """Which implementation `wkv7` runs for heads of (K, V) channels."""
    triton = triton_lacks(facts)
    if min(head_sizes) < LEAST_SIZE or max(head_sizes) > MOST_SIZE:
        triton = triton or (
            f"has heads of {LEAST_SIZE} to {MOST_SIZE} channels, not {head_sizes[0]} (keys), "
            f"{head_sizes[1]}"
        )
    if not triton:
        from rwkvx_kernels.tools.triton_options import missing  # Triton may be missing
        from rwkvx_kernels.wkv7.options import STAGES, TABLE

        triton = missing(TABLE, STAGES, facts.dtype, max(head_sizes), facts.device)
    compiled = compiled_lacks(facts._replace(gradients=False))
    if facts.gradients and head_sizes[0] % GRADIENT_KEYS:
        keys = f"heads whose key channels are a multiple of {GRADIENT_KEYS}"
        compiled = compiled or f"has gradients of {keys}, not of {head_sizes[0]}"
    lacks = {"triton": triton, "compiled": compiled, "torch": "", "reference": ""}
    return decide(impl, facts, lacks)


def chosen_impl(
    device: torch.device | str,
    impl: str = "auto",
    dtype: torch.dtype = torch.float32,
    head_sizes: tuple[int, int] = (64, 64),
) -> str:
    """The name of what `choose` chooses where no gradient is wanted."""
    return choose(Facts(torch.device(device), dtype), head_sizes, impl).impl


@without_autocast
def wkv7(
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The recurrence of RWKV-7 (arXiv 2503.14456), differentiable in every floating argument.

        S_t = S_{t-1} (diag(exp(log_decay_t)) + alpha_t beta_t^T) + v_t k_t^T
        y_t = S_t r_t

    Args:
        r, log_decay, k, alpha, beta: [B, T, H, K]; float32, bfloat16, float16 or float64, all of
            one dtype except `log_decay`, which may be float32 beside narrower ones. T may be 0.
            log_decay <= 0 is the natural logarithm of the decay (no other parametrisation).
        v: [B, T, H, V]. V may differ from K.
        initial_state: [B, H, V, K] float32 (float64 for float64 input), or None for zeros.
            With `cu_seqlens`, [sequences, H, V, K].
        cu_seqlens: [sequences + 1] integer offsets of sequences packed along T, batch size 1.
        impl: "auto", "reference", "torch", "compiled" (Numba, on a CPU; gradients where K is a
            multiple of 32) or "triton": heads of 16 to 128 channels, no float64, and log decays of
            which 8 in a row (32 for gradients of narrow dtypes) sum to -80 or more; stronger ones
            give results that are not finite.

    Returns:
        y [B, T, H, V] in the dtype of `v`, and the final state, of the shape and dtype of
        `initial_state`. The state is kept in float32 (float64 for float64 input) throughout.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, log_decay > 0.
        UnsupportedError: an implementation asked for by name that cannot do this.
    """
    _check(r, log_decay, k, v, alpha, beta)
    facts = facts_of(r, log_decay, k, v, alpha, beta, initial_state)
    impl = choose(facts, (r.shape[-1], v.shape[-1]), impl).impl
    # What is traced may not look at any value.
    if facts.traced and impl != "triton" and r.numel():
        return _opaque(r, log_decay, k, v, alpha, beta, initial_state, cu_seqlens, impl)
    offsets = None
    if cu_seqlens is not None and not facts.traced:
        offsets = check_cu_seqlens(cu_seqlens, r.shape[0], r.shape[1])
    initial_state = _start(r, v, _sequences(r, cu_seqlens), initial_state)
    if impl == "triton":
        from rwkvx_kernels.wkv7.triton_ops import wkv7_triton  # Triton may be missing

        return wkv7_triton([r, log_decay, k, v, alpha, beta, initial_state], cu_seqlens)
    inputs = [x.to(initial_state.dtype) for x in (r, log_decay, k, v, alpha, beta)]
    y, state = _plain(impl, [*inputs, initial_state], offsets)
    return y.to(v.dtype), state


def _plain(impl: str, inputs: list[Tensor], offsets: list[int] | None) -> tuple[Tensor, Tensor]:
    """By an implementation that was chosen, of tensors of the dtype of the state, the last."""
    if impl == "reference":
        return wkv7_reference(*inputs) if offsets is None else _one_by_one(inputs, offsets)
    whole = [inputs[0].shape[1]] * inputs[0].shape[0]
    lengths = whole if offsets is None else [b - a for a, b in pairwise(offsets)]
    if impl == "torch":
        return wkv7_torch(*inputs, lengths=lengths)
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        from rwkvx_kernels.wkv7.numba_gradients import wkv7_with_gradients  # takes a second

        return wkv7_with_gradients(*inputs, lengths=lengths)
    from rwkvx_kernels.wkv7.numba_recurrence import wkv7_compiled  # takes half a second

    return wkv7_compiled(*inputs, lengths=lengths)


def _fake(
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    state = _start(r, v, _sequences(r, cu_seqlens), initial_state)
    return v.new_empty(v.shape), state.new_empty(state.shape)


_opaque = opaque("wkv7_plain", _fake)(wkv7)


def _sequences(r: Tensor, cu_seqlens: Tensor | None) -> int:
    return r.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1


def _start(r: Tensor, v: Tensor, sequences: int, initial_state: Tensor | None) -> Tensor:
    """The initial state: zeros where there is none, checked otherwise."""
    dtype = torch.float64 if r.dtype == torch.float64 else torch.float32
    shape = (sequences, r.shape[2], v.shape[-1], r.shape[-1])
    if initial_state is None:
        return r.new_zeros(shape, dtype=dtype)
    if tuple(initial_state.shape) != shape or initial_state.dtype != dtype:
        raise ValueError(
            f"initial_state must be {list(shape)} {dtype}, "
            f"got {list(initial_state.shape)} {initial_state.dtype}"
        )
    return initial_state


def _one_by_one(inputs: list[Tensor], offsets: list[int]) -> tuple[Tensor, Tensor]:
    """The reference over packed sequences: y [1, T, H, V] and states [sequences, H, V, K]."""
    *tokens, states = inputs
    parts = [
        wkv7_reference(*[*(x[:, a:b] for x in tokens), states[i : i + 1]])
        for i, (a, b) in enumerate(pairwise(offsets))
    ]
    if not parts:
        return torch.zeros_like(inputs[3]), states
    return torch.cat([y for y, _ in parts], dim=1), torch.cat([s for _, s in parts])


def _check(r: Tensor, log_decay: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor) -> None:
    named = {"log_decay": log_decay, "k": k, "alpha": alpha, "beta": beta}
    if r.dim() != 4:
        raise ValueError(f"r must be [B, T, H, K], got {list(r.shape)}")
    for name, x in named.items():
        if x.shape != r.shape:
            raise ValueError(f"{name} must have the shape of r {list(r.shape)}: {list(x.shape)}")
    if v.dim() != 4 or v.shape[:3] != r.shape[:3]:
        raise ValueError(f"v must be [B, T, H, V] beside r {list(r.shape)}, got {list(v.shape)}")
    if r.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise ValueError(f"wkv7 takes floating-point tensors, got {r.dtype}")
    for name, x in {**named, "v": v}.items():
        wider = name == "log_decay" and x.dtype == torch.float32 and r.dtype.itemsize < 4
        if x.dtype != r.dtype and not wider:
            raise ValueError(f"{name} is {x.dtype}, but r is {r.dtype}")
        if x.device != r.device:
            raise ValueError(f"{name} is on {x.device}, but r is on {r.device}")
    if torch.compiler.is_compiling() or log_decay.device.type != "cpu" or not log_decay.numel():
        return
    if float(log_decay.detach().max()) > 0:
        raise ValueError("log_decay must be <= 0 (the logarithm of a decay between 0 and 1)")
