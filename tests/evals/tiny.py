"""A random model of both block kinds, small enough to check everything directly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import rwkvx


class CountingModel(rwkvx.Model):
    """Counts the tokens that it is fed."""

    tokens_fed = 0

    def forward(self, ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.tokens_fed += ids.numel()
        return super().forward(ids, *args, **kwargs)


def tiny_model(tokenizer: str = "bytes", vocab_size: int = 256) -> CountingModel:
    """Width 64, one head, chunks of 4 tokens; the head is scaled up so that answers differ."""
    torch.manual_seed(5)
    config = rwkvx.ModelConfig(
        vocab_size=vocab_size, width=64, pattern=("rwkv7", "sparse"), chunk_size=4, topk=2,
        tokenizer=tokenizer,
    )  # fmt: skip
    model = CountingModel(config)
    rwkvx.init_weights(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn_like(weight)
        model.head.weight *= 3
    return model.eval()
