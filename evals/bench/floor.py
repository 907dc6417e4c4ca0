"""What no implementation of the same model can avoid: its products with weights, and their bytes.

FLOPs count a multiplication and an addition as two.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

import rwkvx
from rwkvx.layers import Linear
from rwkvx.model import SEGMENT_MULTIPLE

# The two factors of the low-rank products of an RWKV-7 block: [C, D] and [D, C].
_LOW_RANK = re.compile(r"blocks\.\d+\.att\.[wavg][12]")


class Products:
    """The products of activations with a model's own weights, alone, in the model's segments, by
    the same routine.

    `linear` are those of its Linear modules (the head for the last token only, as with
    logits="last"), `low_rank` those of the low-rank matrices of its RWKV-7 blocks.
    """

    def __init__(self, model: rwkvx.Model) -> None:
        self._model = model
        self._head = model.head
        self._linear = [module for module in model.blocks.modules() if isinstance(module, Linear)]
        self._low_rank = low_rank_of(model)
        longest = model.segment_lengths(1, 1 << 20)[0] + SEGMENT_MULTIPLE
        widths = {x.in_features for x in (*self._linear, self._head)}
        widths |= {x.shape[0] for x in self._low_rank}
        draw = torch.Generator().manual_seed(0)
        self._inputs = {
            n: torch.randn(1, longest, n, generator=draw).to(model.dtype) for n in sorted(widths)
        }

    def run_linear(self, tokens: int) -> None:
        """One prefill's worth."""
        for size in segments(self._model, tokens):
            for module in self._linear:
                module(self._inputs[module.in_features][:, :size])
        self._head(self._inputs[self._head.in_features][:, :1])

    def run_low_rank(self, tokens: int) -> None:
        """One prefill's worth."""
        for size in segments(self._model, tokens):
            for matrix in self._low_rank:
                self._inputs[matrix.shape[0]][:, :size] @ matrix

    def linear_flops(self, tokens: int, head_tokens: int = 1) -> int:
        """FLOPs of `run_linear`."""
        blocks = sum(module.weight.numel() for module in self._linear)
        return 2 * (blocks * tokens + self._head.weight.numel() * head_tokens)

    def low_rank_flops(self, tokens: int) -> int:
        """FLOPs of `run_low_rank`."""
        return 2 * sum(x.numel() for x in self._low_rank) * tokens


def low_rank_of(model: rwkvx.Model) -> list[Tensor]:
    """The factors of the low-rank products of its RWKV-7 blocks."""
    return [x for n, x in model.named_parameters() if _LOW_RANK.fullmatch(n)]


def segments(model: rwkvx.Model, tokens: int) -> list[int]:
    """Sizes of the segments in which the model reads so many tokens of one sequence."""
    return model.segment_lengths(1, tokens)


def bytes_per_token(model: rwkvx.Model) -> int:
    """Bytes of weights that a decoded token reads: all but the embedding table."""
    return sum(
        x.numel() * x.element_size() for n, x in model.named_parameters() if n != "emb.weight"
    )


def plain_buffer(size: int) -> Tensor:
    """A float32 buffer of about `size` bytes, every page of it touched."""
    return torch.ones(max(1, size // 4))
