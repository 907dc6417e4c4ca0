"""Initial weights: part of the architecture (BlinkDL/RWKV-LM, RWKV-v7/train_temp/src/model.py).

Everything is drawn in float32 and then cast. Symbols: l index among the RWKV-7
blocks, L their number, c channel, C width, N head size.
"""

import math

import torch
from torch import Tensor, nn

from rwkvx.model import Block, Model
from rwkvx.sparse_attention import SparseAttention
from rwkvx.time_mix import TimeMix

# Power p of 1 - (c/C)^(p·(1 - l/L)) for each token-shift mix.
SHIFT_POWER = {"x_r": 0.2, "x_g": 0.2, "x_w": 0.9, "x_a": 0.9, "x_k": 0.7, "x_v": 0.7}


@torch.no_grad()
def init_weights(model: Model, seed: int = 0) -> Model:
    """Fill every parameter with its initial value; the same `seed` gives the same weights.

    Sparse blocks use the values of the RWKV-7 projections, with keys of gain 1 (scores of unit
    scale) and a convolution that starts as the identity.
    """
    generator = torch.Generator().manual_seed(seed)
    width, vocab = model.config.width, model.config.vocab_size
    _fill(model.emb.weight, torch.empty(vocab, width).uniform_(-1e-4, 1e-4, generator=generator))
    gain = 0.5 * math.sqrt(vocab / width) if vocab > width else 0.5
    _orthogonal(model.head.weight, gain, generator)
    for norm in (model.ln0, model.ln_out):
        _unit_norm(norm)
    depth, rwkv_blocks, index = len(model.blocks), model.config.pattern.count("rwkv7"), 0
    for position, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        if isinstance(block.att, TimeMix):
            _init_time_mix(block.att, index, rwkv_blocks, generator)
            _init_around_mixer(block, 1 - index / rwkv_blocks, generator)
            index += 1
        else:
            init_sparse_block(block, 1 - position / depth, generator)
    return model


@torch.no_grad()
def init_sparse_block(block: Block, ratio: float, generator: torch.Generator) -> None:
    """Fill one sparse block; `ratio` falls from 1 to 0 with depth. It puts out nothing yet."""
    assert isinstance(block.att, SparseAttention)
    _init_sparse(block.att, generator)
    _init_around_mixer(block, ratio, generator)


def _init_around_mixer(block: Block, ratio: float, generator: torch.Generator) -> None:
    """Norms and channel mix of either kind of block."""
    _unit_norm(block.ln1)
    _unit_norm(block.ln2)
    channel = torch.arange(block.config.width) / block.config.width
    _fill(block.ffn.x_k, 1 - channel ** (ratio**4))
    _orthogonal(block.ffn.key.weight, 1.0, generator)
    nn.init.zeros_(block.ffn.value.weight)


def _init_time_mix(att: TimeMix, layer: int, layers: int, generator: torch.Generator) -> None:
    width, size = att.x_r.numel(), att.head_size
    channel = torch.arange(width, dtype=torch.float32)
    linear = channel / max(width - 1, 1) - 0.5
    half = (size - 1) / 2
    z = (channel % size - half) / max(half, 0.5)
    zigzag = z * z.abs()
    to_zero, to_one = 1 - layer / layers, layer / max(layers - 1, 1)
    for name, power in SHIFT_POWER.items():
        _fill(getattr(att, name), 1 - (channel / width) ** (power * to_zero))
    speed = -6 + 6 * (channel / max(width - 1, 1)) ** (1 + to_one**0.3)
    _fill(att.w0, speed + 0.5 + 2.5 * zigzag)
    _fill(att.a0, -0.19 + 0.3 * zigzag + 0.4 * linear)
    if not att.first:
        _fill(att.v0, 0.73 - 0.4 * linear)
    _fill(att.k_k, 0.71 - 0.1 * linear)
    nn.init.constant_(att.k_a, 1.02)
    nn.init.constant_(att.r_k, -0.04)
    for name in ("w", "a", "g") if att.first else ("w", "a", "v", "g"):
        nn.init.zeros_(getattr(att, f"{name}1"))
        low = getattr(att, f"{name}2")
        rows, columns = low.shape
        _orthogonal(low, 0.1 * math.sqrt(rows / columns) if rows > columns else 0.1, generator)
    _orthogonal(att.receptance.weight, 1.0, generator)
    _orthogonal(att.key.weight, 0.1, generator)
    _orthogonal(att.value.weight, 1.0, generator)
    nn.init.zeros_(att.output.weight)
    nn.init.constant_(att.ln_x.weight, ((layer + 1) / layers) ** 0.7)
    nn.init.zeros_(att.ln_x.bias)


def _init_sparse(att: SparseAttention, generator: torch.Generator) -> None:
    for name in ("receptance", "key", "value"):
        _orthogonal(getattr(att, name).weight, 1.0, generator)
    nn.init.zeros_(att.output.weight)
    if att.config.key_conv:
        nn.init.zeros_(att.key_conv)
        nn.init.ones_(att.key_conv[-1])


def _unit_norm(norm: nn.LayerNorm) -> None:
    nn.init.ones_(norm.weight)
    nn.init.zeros_(norm.bias)


def _fill(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value)


def _orthogonal(parameter: Tensor, gain: float, generator: torch.Generator) -> None:
    value = torch.empty(parameter.shape, dtype=torch.float32)
    parameter.copy_(nn.init.orthogonal_(value, gain=gain, generator=generator))
