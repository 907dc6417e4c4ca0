"""The time mix between its projections in Triton, as operators of torch with gradients.

One operator from the projections to the output projection, so that gradients that meet (of r, keys,
values) are added inside a kernel. Importing this module registers `torch.ops.rwkvx.time_mix*`.
Lists of tensors: `tokens` r, w, k, v, a, g and, with a value residual, mix, v_first; `weights` w0,
a0, k_k, k_a, r_k, norm weight and bias and, with one, v0. Shapes as in `api.time_mix`, contiguous.
"""

from typing import Any

import torch
from torch import Tensor

from rwkvx_kernels.time_mix import triton_finish, triton_keys
from rwkvx_kernels.time_mix.triton_step import step
from rwkvx_kernels.tools.operators import operator
from rwkvx_kernels.wkv7 import triton_ops as recurrence


def time_mix_triton(
    tokens: list[Tensor],
    weights: list[Tensor],
    eps: float,
    state: Tensor,
    cu_seqlens: Tensor | None,
    training: bool,
) -> tuple[Tensor, Tensor]:
    """What the output projection reads, and the final state."""
    tokens = [x.to(tokens[0].dtype).contiguous() for x in tokens]
    arguments = (tokens, [x.contiguous() for x in weights], eps, state.contiguous(), cu_seqlens)
    if not training and tokens[0].shape[1] <= recurrence.STEP_TOKENS:
        out, final = time_mix_step(*arguments)
    else:
        out, final, *_ = time_mix_forward(*arguments, training)
    return out, final


def forward(
    tokens: list[Tensor],
    weights: list[Tensor],
    eps: float,
    state: Tensor,
    cu_seqlens: Tensor | None,
    keep: bool,
) -> list[Tensor]:
    """Output, final state and, with `keep`, what the backward pass reads.

    These are y, the states before chunks, P of segments, log_decay, key, alpha, beta and, with a
    value residual, value.
    """
    r, w, k, v, a, g, *residual = tokens
    w0, a0, k_k, k_a, r_k, norm_weight, norm_bias, *v0 = weights
    made = triton_keys.prepare([w, k, v, a], residual, [w0, a0, k_k, k_a, *v0], len(r_k))
    inputs = _recurrent(r, v, made, len(r_k))
    y, final, states, u, p = recurrence.forward(inputs, state, cu_seqlens, keep)
    y, key, value = (x.flatten(2) for x in (y, *inputs[2:4]))
    out = triton_finish.finish([y, r, key, value, g], [r_k, norm_weight, norm_bias], eps)
    if states is None or u is None:
        return [out, final]
    return [out, final, y, states, u, p, *made]


def _recurrent(r: Tensor, v: Tensor, made: list[Tensor], heads: int) -> list[Tensor]:
    """What `wkv7` takes, [B, T, H, D], of what `triton_keys.prepare` made."""
    log_decay, key, alpha, beta, *value = made
    value = value or [v]
    return [x.unflatten(2, (heads, -1)) for x in (r, log_decay, key, *value, alpha, beta)]


def _gradients(grads: list[Tensor], kept: list[Tensor], args: tuple[Any, ...]) -> list[Tensor]:
    """Gradients of all tokens, all weights and the initial state."""
    (tokens, weights, eps, _, cu_seqlens, _), (dout, dfinal) = args, grads
    r, w, k, v, a, g, *residual = tokens
    w0, a0, k_k, k_a, r_k, norm_weight, norm_bias, *v0 = weights
    y, states, u, p, *made = kept
    inputs = _recurrent(r, v, made, len(r_k))
    key, value = inputs[2].flatten(2), inputs[3].flatten(2)
    (dy, dvalue, dg, dbonus), last = triton_finish.gradients(
        dout, [y, r, key, value, g], [r_k, norm_weight, norm_bias], eps
    )
    *later, dstate = recurrence.backward(
        inputs, [states, u, p], cu_seqlens, dy.unflatten(2, (len(r_k), -1)), dfinal
    )
    later = [dbonus, dvalue, *(x.flatten(2) for x in later)]
    own = [w0, a0, k_k, k_a, *v0]
    new, first = triton_keys.gradients([r, w, k, v, a], residual, own, r_k, later)
    made_of = zip([*first[:4], *last, *first[4:]], weights, strict=True)
    # A copy each: outputs of an operator share no memory.
    dweights = [dx.view_as(x).to(x.dtype, copy=True) for dx, x in made_of]
    return [*new[:5], dg, *new[5:], *dweights, dstate]


def _fake(
    tokens: list[Tensor],
    weights: list[Tensor],
    _: float,
    state: Tensor,
    cu_seqlens: Tensor | None,
    keep: bool = False,
) -> list[Tensor]:
    out, final = torch.empty_like(tokens[3]), torch.empty_like(state)
    if not keep:
        return [out, final]
    heads = tokens[0].unflatten(2, (len(weights[4]), -1))
    kept = recurrence.kept_like(heads, heads, cu_seqlens)
    made = [torch.empty_like(tokens[2]) for _ in range(4 if len(tokens) > 6 else 3)]
    log_decay = torch.empty_like(tokens[2], dtype=torch.float32)
    return [out, final, torch.empty_like(tokens[3]), *kept, log_decay, *made]


@operator("time_mix_step", _fake)
def time_mix_step(
    tokens: list[Tensor],
    weights: list[Tensor],
    eps: float,
    state: Tensor,
    cu_seqlens: Tensor | None,
) -> list[Tensor]:
    """Token by token, without a gradient: output and final state."""
    return step(tokens[:6], tokens[6:], weights, eps, state, cu_seqlens)


@operator("time_mix", _fake, _gradients, outputs=2, kept=slice(2, None))
def time_mix_forward(
    tokens: list[Tensor],
    weights: list[Tensor],
    eps: float,
    state: Tensor,
    cu_seqlens: Tensor | None,
    keep: bool,
) -> list[Tensor]:
    """What `forward` says."""
    return forward(tokens, weights, eps, state, cu_seqlens, keep)
