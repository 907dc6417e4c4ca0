"""The channel mix of RWKV-7, in both kinds of block.

Axes: B batch, T time, C width.
"""

import torch
from torch import Tensor, nn

from rwkvx.config import ModelConfig
from rwkvx.linear import Linear
from rwkvx.time_mix import last_token
from rwkvx_kernels.channel_mix import squared_relu
from rwkvx_kernels.token_shift import token_shift


class ChannelMix(nn.Module):
    """W_v relu(W_k (x + (shift(x) - x) x_k))^2 (arXiv 2503.14456, eq. 21-22)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.x_k = nn.Parameter(torch.empty(config.width))
        self.key = Linear(config.width, config.ffn_mult * config.width)
        self.value = Linear(config.ffn_mult * config.width, config.width)

    def forward(
        self, x: Tensor, shift: Tensor, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x [B, T, C], normalised, and the last input before it [B, C] -> output, new shift."""
        (mixed,) = token_shift(x, shift, [self.x_k], cu_seqlens)
        hidden = squared_relu(self.key(mixed), overwrite=True)
        return self.value(hidden), last_token(x, shift, cu_seqlens)
