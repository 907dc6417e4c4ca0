"""Initial weights: part of the architecture (BlinkDL/RWKV-LM, RWKV-v7/train_temp/src/model.py).

Everything is drawn in float32 and then cast. Every kind of block fills its own mixer
(`Mixer.init_weights`); c is a channel, C the width.
"""

import math

import torch
from torch import nn

from rwkvx.kinds.contract import orthogonal
from rwkvx.model import Block, Model


@torch.no_grad()
def init_weights(model: Model, seed: int = 0) -> Model:
    """Fill every parameter with its initial value; the same `seed` gives the same weights."""
    generator = torch.Generator().manual_seed(seed)
    width, vocab = model.config.width, model.config.vocab_size
    model.emb.weight.copy_(torch.empty(vocab, width).uniform_(-1e-4, 1e-4, generator=generator))
    gain = 0.5 * math.sqrt(vocab / width) if vocab > width else 0.5
    orthogonal(model.head.weight, gain, generator)
    _unit_norms(model.ln0, model.ln_out)
    for block in model.blocks:
        init_block(block, generator)
    return model


@torch.no_grad()
def init_block(block: Block, generator: torch.Generator, height: float | None = None) -> None:
    """Fill one block. It puts out nothing yet.

    height: 1 for the first block, falling to 0 with depth; default: as its kind counts.
    """
    block.att.init_weights(generator)
    _unit_norms(block.ln1, block.ln2)
    height = block.att.height if height is None else height
    channel = torch.arange(block.ffn.x_k.numel()) / block.ffn.x_k.numel()
    block.ffn.x_k.copy_(1 - channel ** (height**4))
    orthogonal(block.ffn.key.weight, 1.0, generator)
    nn.init.zeros_(block.ffn.value.weight)


def _unit_norms(*norms: nn.LayerNorm) -> None:
    for norm in norms:
        nn.init.ones_(norm.weight)
        nn.init.zeros_(norm.bias)
