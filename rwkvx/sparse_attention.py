"""The mixer of sparse blocks: top-k chunk attention without positional encoding.

RWKV-X (arXiv 2504.21463) with the selection of MoBA (arXiv 2502.13189); the key convolution is
that of "Optimizing Mixture of Block Attention" (arXiv 2511.11571).
Axes: B batch, T time, C width, H query heads, G key/value heads, N head size, W convolution width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from rwkvx.config import ModelConfig
from rwkvx.errors import InputError
from rwkvx.linear import Linear
from rwkvx.state import CachedRows
from rwkvx_kernels.chunk_attention import (
    KeyValueCache,
    cached_chunk_attention,
    chunk_attention,
)

UNDEFINED = (
    "gradients do not flow into a filled attention cache: start from state.recurrent(), or run "
    "under torch.no_grad()"
)


def _filled(cached: tuple[CachedRows, ...]) -> bool:
    """Whether tokens were read before; looks at the device where lengths are kept there."""
    return any(bool(length) for _, length in cached)


class _WithoutGradient(torch.autograd.Function):
    """What was computed without a gradient: refuses to have one, but only when it is asked."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, like: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise InputError(UNDEFINED)


class SparseAttention(nn.Module):
    """Queries (`receptance`), keys, values; the own chunk causally and the best past chunks."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, self.topk = config, config.topk
        kv_width = config.kv_heads * config.head_size
        self.receptance = Linear(config.width, config.width)
        self.key = Linear(config.width, kv_width)
        self.value = Linear(config.width, kv_width)
        self.output = Linear(config.width, config.width)
        if config.key_conv:
            self.key_conv = nn.Parameter(torch.empty(config.key_conv, kv_width))

    def forward(
        self,
        x: Tensor,
        cached: tuple[CachedRows, ...],
        conv: Tensor | None,
        cu_seqlens: Tensor | None = None,
        keep_cache: bool = True,
    ) -> tuple[Tensor, tuple[CachedRows, ...], Tensor | None]:
        """Attend.

        Args:
            x: [B, T, C], normalised.
            cached: the tokens read before (empty at the start).
            conv: [B, W - 1, G·N], keys before the convolution (None without one).
            cu_seqlens: offsets of packed sequences; caches and conv have one row per sequence.
            keep_cache: False keeps no new cache, which spares its memory in training.

        Returns:
            output [B, T, C], cached, conv.

        Gradients through a filled cache are not defined: asking for them is an InputError.
        """
        q, k, v = self.receptance(x), self.key(x), self.value(x)
        y, cached, conv = self.attend(q, k, v, cached, conv, cu_seqlens, keep_cache)
        return self.output(y), cached, conv

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cached: tuple[CachedRows, ...],
        conv: Tensor | None,
        cu_seqlens: Tensor | None = None,
        keep_cache: bool = True,
    ) -> tuple[Tensor, tuple[CachedRows, ...], Tensor | None]:
        """`forward` between its projections: q [B, T, C], k and v [B, T, G·N] -> y [B, T, C]."""
        size, selection = self.config.head_size, self.config.selection
        training = torch.is_grad_enabled() and q.requires_grad
        if training and _filled(cached):
            if torch.compiler.is_compiling():
                raise InputError(UNDEFINED)
            with torch.no_grad():
                y, cached, conv = self.attend(q, k, v, cached, conv, cu_seqlens, keep_cache)
            return _WithoutGradient.apply(y, q), cached, conv
        if conv is not None:
            k, conv = self._convolve(k, conv, cu_seqlens)
        q, k, v = (z.to(q.dtype).unflatten(-1, (-1, size)) for z in (q, k, v))
        if training or not (keep_cache or _filled(cached)):
            shape = (self.config.chunk_size, self.topk)
            y = chunk_attention(q, k, v, *shape, cu_seqlens, selection=selection)
            k, v = k.detach(), v.detach()
            parts = self._parts(q, k, v, cached, cu_seqlens) if keep_cache else []
            return y.flatten(-2), tuple(old.append(k, v) for _, k, v, old in parts), conv
        outputs, new = [], []
        for part_q, part_k, part_v, old in self._parts(q, k, v, cached, cu_seqlens):
            new.append(old.append(part_k, part_v))
            outputs.append(cached_chunk_attention(part_q, *new[-1], self.topk, selection=selection))
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 0 if cu_seqlens is None else 1)
        return y.flatten(-2), tuple(new), conv

    def _parts(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cached: tuple[CachedRows, ...],
        cu_seqlens: Tensor | None,
    ) -> list[tuple[Tensor, Tensor, Tensor, CachedRows]]:
        """Queries, keys and values beside what they continue: packed sequences one by one, rows of
        a batch in the groups that were cached together."""
        if cu_seqlens is None:
            cached = cached or (self._empty(k, len(k)),)
            sizes, dim = [rows.cache.batch for rows in cached], 0
        else:
            if torch.compiler.is_compiling():  # lengths are values, which it cannot look at
                raise InputError("compiled, packed sequences keep no cache: keep_cache=False")
            sizes, dim = cu_seqlens.diff().tolist(), 1
            if not cached:
                cached = tuple(self._empty(k, 1) for _ in sizes)
            elif len(cached) < len(sizes):
                rows = torch.arange(len(sizes), device=k.device).split(1)
                cached = tuple(cached[0].select(row) for row in rows)
        if len(cached) == 1:
            return [(q, k, v, cached[0])]
        return list(zip(*(x.split(sizes, dim) for x in (q, k, v)), cached, strict=True))

    def _empty(self, like: Tensor, rows: int) -> CachedRows:
        heads, size = self.config.kv_heads, self.config.head_size
        return CachedRows(KeyValueCache(rows, heads, size, self.config.chunk_size, like), 0)

    def _convolve(
        self, k: Tensor, conv: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Causal depthwise convolution over time; the last of the W taps is the token itself."""
        tokens, before = k.shape[1], conv.shape[1]
        mixed = k * self.key_conv[-1]
        if cu_seqlens is None:
            padded = torch.cat([conv, k], dim=1)
            for tap in range(before):
                mixed = torch.addcmul(mixed, padded[:, tap : tap + tokens], self.key_conv[tap])
            return mixed, padded[:, tokens:]
        start, length = cu_seqlens[:-1], cu_seqlens.diff()
        token, row = (torch.arange(n, device=k.device) for n in (tokens, len(length)))
        owner = torch.searchsorted(cu_seqlens[1:], token, right=True)
        padded = torch.cat([k[0], conv.flatten(0, 1)])

        def place(at: Tensor, row: Tensor) -> Tensor:
            """Where the key `at` of a sequence stands in `padded`; before the first: at < 0."""
            return (start[row] + at).where(at >= 0, tokens + (row + 1) * before + at)

        for tap in range(before):
            at = place(token - start[owner] - before + tap, owner)
            mixed = torch.addcmul(mixed, padded[at], self.key_conv[tap])
        last = length[:, None] + torch.arange(-before, 0, device=k.device)
        return mixed, padded[place(last, row[:, None])]
