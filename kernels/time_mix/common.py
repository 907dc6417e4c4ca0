"""What the implementations of the time mix share: its weights, its one constant, its equations.

Axes: B batch, T time, C width, H heads, D head size.
"""

from collections.abc import Callable, Sequence
from math import exp
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Bounds the decay: log_decay = LOG_DECAY_SCALE · sigmoid(·), so a decay is at least exp(-0.6065).
LOG_DECAY_SCALE = -exp(-0.5)


class TimeMixWeights(NamedTuple):
    """The vectors of a time mix: [C] each, r_k [H, D]; v0 is None without a value residual."""

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


def recurrence_inputs(
    tokens: Sequence[Tensor], weights: TimeMixWeights
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `wkv7` reads (eq. 4-13): r, log_decay, k, v, alpha, beta, each [B, T, H, D].

    tokens: r, w, k, v, a and, with a value residual, its gate and the values of the first block.
    """
    r, w, k, v, a, *residual = tokens
    size = weights.r_k.shape[1]

    def heads(x: Tensor) -> Tensor:
        """[..., C] -> [..., H, D]."""
        return x.reshape(*x.shape[:-1], -1, size)  # unflatten costs 3 µs a call

    wide = torch.promote_types(w.dtype, torch.float32)  # a decay of 0.999 needs the bits
    log_decay = torch.sigmoid(weights.w0.to(wide) + w) * LOG_DECAY_SCALE
    if residual and weights.v0 is not None:
        mix, v_first = residual
        v = torch.lerp(v, v_first, torch.sigmoid(weights.v0 + mix).to(v.dtype))
    a = torch.sigmoid(weights.a0 + a)
    kk = F.normalize(heads(k * weights.k_k), dim=-1).to(r.dtype)
    k = k * torch.addcmul(1 - weights.k_a, a, weights.k_a)  # k (1 + (a - 1) k_a)
    # The casts are no-ops except under autocast.
    r, k, v, a, log_decay = map(heads, (r, k.to(r.dtype), v.to(r.dtype), a.to(r.dtype), log_decay))
    return r, log_decay, k, v, -kk, kk * a


def equations(
    tokens: Sequence[Tensor],
    weights: TimeMixWeights,
    eps: float,
    recurrence: Callable[..., tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """As `api.time_mix` (arXiv 2503.14456, eq. 4-20) of r, w, k, v, a, g and, with a value
    residual, its gate and the values of the first block.

    recurrence: as `wkv7`, of r, log_decay, k, v, alpha, beta.
    """
    g, size = tokens[5], weights.r_k.shape[1]
    r, log_decay, k, v, alpha, beta = recurrence_inputs((*tokens[:5], *tokens[6:]), weights)
    y, state = recurrence(r, log_decay, k, v, alpha, beta)
    y = F.layer_norm(y, (size,), eps=eps)  # over each head: a group norm
    norm_weight, norm_bias = (x.reshape(-1, size) for x in (weights.norm_weight, weights.norm_bias))
    y = torch.addcmul(norm_bias, y, norm_weight)
    bonus = (r * k * weights.r_k).sum(dim=-1, keepdim=True)
    return torch.addcmul(y, bonus, v).flatten(-2) * g, state
