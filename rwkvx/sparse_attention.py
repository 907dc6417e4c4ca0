"""The mixer of sparse blocks: top-k chunk attention without positional encoding.

RWKV-X (arXiv 2504.21463) with the selection of MoBA (arXiv 2502.13189); the key convolution is
that of "Optimizing Mixture of Block Attention" (arXiv 2511.11571).
Axes: B batch, T time, C width, H query heads, G key/value heads, N head size, W convolution width.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from rwkvx.config import ModelConfig
from rwkvx.errors import InputError
from rwkvx_kernels.chunk_attention import (
    KeyValueCache,
    cached_chunk_attention,
    chunk_attention,
)


class SparseAttention(nn.Module):
    """Queries (`receptance`), keys, values; the own chunk causally and the best past chunks."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, self.topk = config, config.topk
        kv_width = config.kv_heads * config.head_size
        self.receptance = nn.Linear(config.width, config.width, bias=False)
        self.key = nn.Linear(config.width, kv_width, bias=False)
        self.value = nn.Linear(config.width, kv_width, bias=False)
        self.output = nn.Linear(config.width, config.width, bias=False)
        if config.key_conv:
            self.key_conv = nn.Parameter(torch.empty(config.key_conv, kv_width))

    def forward(
        self,
        x: Tensor,
        cache: KeyValueCache | None,
        length: int,
        conv: Tensor | None,
        cu_seqlens: Tensor | None = None,
        keep_cache: bool = True,
    ) -> tuple[Tensor, KeyValueCache | None, Tensor | None]:
        """Attend.

        Args:
            x: [B, T, C], normalised.
            cache, length: the tokens read before (None, 0 at the start).
            conv: [B, W - 1, G·N], keys before the convolution (None without one).
            cu_seqlens: offsets of packed sequences; then nothing was read before.
            keep_cache: False returns no cache, which spares its memory in training.

        Returns:
            output [B, T, C], cache, conv.

        Raises:
            InputError: gradients through a non-empty cache are not defined.
        """
        size = self.config.head_size
        q, k, v = self.receptance(x), self.key(x), self.value(x)
        if conv is not None:
            k, conv = self._convolve(k, conv, cu_seqlens)
        q, k, v = (z.to(q.dtype).unflatten(-1, (-1, size)) for z in (q, k, v))
        training = torch.is_grad_enabled() and q.requires_grad
        if training and length:
            raise InputError(
                "gradients do not flow into a filled attention cache: start from "
                "state.recurrent(), or run under torch.no_grad()"
            )
        if keep_cache and cu_seqlens is None:
            if cache is None:
                cache = KeyValueCache(
                    x.shape[0], self.config.kv_heads, size, self.config.chunk_size, k
                )
            cache = cache.append(length, k.detach(), v.detach())
        if training or cache is None:
            y = chunk_attention(q, k, v, self.config.chunk_size, self.topk, cu_seqlens)
        else:
            y = cached_chunk_attention(q, cache, length + x.shape[1], self.topk)
        return self.output(y.flatten(-2)), cache, conv

    def _convolve(
        self, k: Tensor, conv: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Causal depthwise convolution over time; the last of the W taps is the token itself."""
        if cu_seqlens is not None:
            offsets = cu_seqlens.tolist()
            parts = [
                self._convolve(k[:, a:b], conv[i : i + 1], None)
                for i, (a, b) in enumerate(pairwise(offsets))
            ]
            return torch.cat([p for p, _ in parts], 1), torch.cat([c for _, c in parts])
        tokens, width = k.shape[1], self.key_conv.shape[0]
        padded = torch.cat([conv, k], dim=1)
        mixed = padded[:, width - 1 :] * self.key_conv[-1]
        for tap in range(width - 1):
            mixed = torch.addcmul(mixed, padded[:, tap : tap + tokens], self.key_conv[tap])
        return mixed, padded[:, tokens:]
