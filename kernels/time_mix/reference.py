"""The time mix between its projections, equation by equation.

Axes: B batch, T time, C width, H heads, N head size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkvx_kernels.wkv7 import wkv7


def gates(
    w: Tensor,
    v: Tensor,
    a: Tensor,
    residual: tuple[Tensor, Tensor] | None,
    weights: Any,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """log_decay, values and a of what the projections give; arguments as of `api.time_mix`."""
    wide = torch.promote_types(w.dtype, torch.float32)  # a decay of 0.999 needs the bits
    log_decay = torch.sigmoid(weights.w0.to(wide) + w) * scale
    if residual is not None:
        mix, v_first = residual
        v = torch.lerp(v, v_first, torch.sigmoid(weights.v0 + mix).to(v.dtype))
    return log_decay, v, torch.sigmoid(weights.a0 + a)


def time_mix_reference(
    r: Tensor,
    log_decay: Tensor,
    v: Tensor,
    a: Tensor,
    k: Tensor,
    g: Tensor,
    k_k: Tensor,
    k_a: Tensor,
    r_k: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    state: Tensor,
    cu_seqlens: Tensor | None,
    recurrence: str,
) -> tuple[Tensor, Tensor]:
    """As `api.time_mix` after `gates`; `recurrence` is the implementation of `wkv7`."""
    size = r_k.shape[1]

    def heads(x: Tensor) -> Tensor:
        """[..., C] -> [..., H, N]."""
        return x.view(*x.shape[:-1], -1, size)  # unflatten costs 3 µs a call

    kk = F.normalize(heads(k * k_k), dim=-1).to(r.dtype)
    k = k * torch.addcmul(1 - k_a, a, k_a)  # k (1 + (a - 1) k_a)
    # The casts are no-ops except under autocast.
    r, k, v, a, log_decay = map(heads, (r, k.to(r.dtype), v.to(r.dtype), a.to(r.dtype), log_decay))
    y, state = wkv7(r, log_decay, k, v, -kk, kk * a, state, cu_seqlens, impl=recurrence)
    y = F.layer_norm(y, (size,), eps=eps)  # over each head: a group norm
    y = torch.addcmul(heads(norm_bias), y, heads(norm_weight))
    bonus = (r * k * r_k).sum(dim=-1, keepdim=True)
    return torch.addcmul(y, bonus, v).flatten(-2) * g, state
