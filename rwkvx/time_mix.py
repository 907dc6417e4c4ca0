"""The mixer of RWKV-7 blocks (arXiv 2503.14456; BlinkDL/RWKV-LM, RWKV-v7/train_temp).

Axes: B batch, T time, C width, H heads, N head size, D low rank.
"""

from math import exp

import torch
from torch import Tensor, nn

from rwkvx.config import ModelConfig
from rwkvx.linear import Linear
from rwkvx_kernels.linear import low_rank
from rwkvx_kernels.time_mix import time_mix

# Bounds the decay: log_decay = LOG_DECAY_SCALE · sigmoid(·), so a decay is at least exp(-0.6065).
LOG_DECAY_SCALE = -exp(-0.5)
MIXES = ("r", "w", "k", "v", "a", "g")


def token_shift(x_BTC: Tensor, previous: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The token before each token: [B, T, C].

    `previous` [B, C] stands before the first token; for packed sequences, [sequences, C] before
    the first token of each.
    """
    if cu_seqlens is None:
        first = previous.unsqueeze(1)
        return first if x_BTC.shape[1] == 1 else torch.cat([first, x_BTC[:, :-1]], dim=1)
    # An empty sequence starts where the next one does: its token goes behind the end, and off.
    shifted = torch.cat([x_BTC[:, :1], x_BTC], dim=1)
    first = cu_seqlens[:-1].where(cu_seqlens.diff() > 0, x_BTC.shape[1])
    return shifted.index_copy(1, first, previous.unsqueeze(0))[:, :-1]


def last_token(x_BTC: Tensor, previous: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The last token of each sequence, what was before it of an empty one: [B or sequences, C]."""
    if cu_seqlens is None:
        return x_BTC[:, -1]
    some = cu_seqlens.diff() > 0
    return torch.where(some.unsqueeze(1), x_BTC[0, cu_seqlens[1:] - 1], previous)


class TimeMix(nn.Module):
    """r, w, k, v, a, g from the token-shifted input, the WKV7 recurrence, group norm and gate."""

    x_r: nn.Parameter
    w0: nn.Parameter
    w1: nn.Parameter
    w2: nn.Parameter
    a0: nn.Parameter
    a1: nn.Parameter
    a2: nn.Parameter
    v0: nn.Parameter
    v1: nn.Parameter
    v2: nn.Parameter
    g1: nn.Parameter
    g2: nn.Parameter
    receptance: Linear
    key: Linear
    value: Linear
    output: Linear

    def __init__(self, config: ModelConfig, first: bool) -> None:
        super().__init__()
        width, self.head_size = config.width, config.head_size
        self.first = first
        for name in MIXES:
            self.register_parameter(f"x_{name}", nn.Parameter(torch.empty(width)))
        for name, rank in config.ranks.items():
            if name == "v" and first:  # the first block makes v_first and needs no value residual
                continue
            if name != "g":
                self.register_parameter(f"{name}0", nn.Parameter(torch.empty(width)))
            self.register_parameter(f"{name}1", nn.Parameter(torch.empty(width, rank)))
            self.register_parameter(f"{name}2", nn.Parameter(torch.empty(rank, width)))
        self.k_k, self.k_a = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))
        self.r_k = nn.Parameter(torch.empty(config.heads, config.head_size))
        for name in ("receptance", "key", "value", "output"):
            self.add_module(name, Linear(width, width))
        self.ln_x = nn.GroupNorm(config.heads, width, eps=config.group_norm_eps)

    def forward(
        self,
        x: Tensor,
        shift: Tensor,
        wkv: Tensor,
        v_first: Tensor | None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mix over time.

        Args:
            x: [B, T, C], normalised. shift: [B, C]. wkv: [B, H, N, N] float32.
            v_first: [B, T, C], the values of the first RWKV-7 block (None in that block).

        Returns:
            output [B, T, C], new shift, new wkv, v_first.
        """
        delta = token_shift(x, shift, cu_seqlens) - x
        mixes = torch.stack([getattr(self, f"x_{name}") for name in MIXES])[:, None, None]
        x_r, x_w, x_k, x_v, x_a, x_g = torch.addcmul(x, delta, mixes).unbind()
        r, k, v = self.receptance(x_r), self.key(x_k), self.value(x_v)
        wide = torch.promote_types(x.dtype, torch.float32)  # a decay of 0.999 needs the bits
        w = self.w0.to(wide) + low_rank(x_w, self.w1, self.w2, "tanh")
        log_decay = torch.sigmoid(w) * LOG_DECAY_SCALE
        a = torch.sigmoid(self.a0 + low_rank(x_a, self.a1, self.a2))
        g = low_rank(x_g, self.g1, self.g2, "sigmoid")
        if v_first is None:
            v_first = v
        else:
            mix = torch.sigmoid(self.v0 + low_rank(x_v, self.v1, self.v2))
            v = torch.lerp(v, v_first, mix.to(v.dtype))
        weights = (self.k_k, self.k_a, self.r_k, self.ln_x.weight, self.ln_x.bias)
        y, wkv = time_mix(r, log_decay, k, v, a, g, *weights, self.ln_x.eps, wkv, cu_seqlens)
        return self.output(y), last_token(x, shift, cu_seqlens), wkv, v_first
