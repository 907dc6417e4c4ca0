"""A dense Transformer of the same size, to hold a hybrid against: plain torch, random weights.

Width, depth, heads and feed-forward are those of a hybrid. Attention is torch's own, to all past
tokens; there is no positional encoding, which would only cost it time. Axes: B batch, T time,
C width, H heads, S room of the cache, D head size, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rwkvx


class Cache:
    """Keys and values of every block, each [B, H, S, D], of which `length` tokens are there."""

    def __init__(self, model: Transformer, room: int) -> None:
        weight = model.emb.weight
        shape = (1, model.heads, room, weight.shape[1] // model.heads)
        self.keys, self.values = ([weight.new_empty(shape) for _ in model.blocks] for _ in range(2))
        self.length = 0

    def fill(self, tokens: int) -> None:
        """With random numbers in the place of so many tokens."""
        for x in (*self.keys, *self.values):
            x[:, :, :tokens].normal_()
        self.length = tokens


class Attention(nn.Module):
    """Causal, softmax, all heads alike."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cache: Cache | None, block: int) -> Tensor:
        """x [B, T, C]; with a cache that is not empty, T = 1."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        past, tokens = 0, x.shape[1]
        if cache is not None:
            past, end = cache.length, cache.length + tokens
            if past and tokens > 1:
                raise ValueError("after the first call a dense Transformer reads token by token")
            cache.keys[block][:, :, past:end], cache.values[block][:, :, past:end] = k, v
            if past:
                k, v = cache.keys[block][:, :, :end], cache.values[block][:, :, :end]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=not past)
        return self.output(y.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """x += attention(norm(x)); x += feed_forward(norm(x))."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.key = nn.Linear(width, inner, bias=False)
        self.value = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, cache: Cache | None, block: int) -> Tensor:
        """x [B, T, C]; the feed-forward is RWKV-7's without its token shift."""
        x = x + self.attention(self.ln1(x), cache, block)
        return x + self.value(torch.relu(self.key(self.ln2(x))).square_())


class Transformer(nn.Module):
    """As many blocks as the hybrid has, every one of them dense."""

    def __init__(self, config: rwkvx.ModelConfig) -> None:
        super().__init__()
        width, self.heads = config.width, config.heads
        self.emb = nn.Embedding(config.vocab_size, width)
        self.blocks = nn.ModuleList(
            Block(width, config.heads, config.ffn_mult * width) for _ in config.pattern
        )
        self.ln_out = nn.LayerNorm(width)
        self.head = nn.Linear(width, config.vocab_size, bias=False)

    def forward(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """ids [B, T] -> logits [B, 1, V] of the last token; `cache` then holds T tokens more."""
        x = self.emb(ids)
        for i, block in enumerate(self.blocks):
            x = block(x, cache, i)
        if cache is not None:
            cache.length += ids.shape[1]
        logits: Tensor = self.head(self.ln_out(x[:, -1:]))
        return logits
