"""Checkpoints of random weights, none of them zero, in several shapes."""

from typing import Any

import torch
from torch import Tensor

import rwkvx
from rwkvx.checkpoint.checkpoint import Checkpoint


def config(**changes: object) -> rwkvx.ModelConfig:
    base = {
        "vocab_size": 300,
        "width": 128,
        "pattern": list(rwkvx.hybrid_pattern(4, 2)),
        "chunk_size": 16,
        "topk": 3,
        "tokenizer": None,
    }
    return rwkvx.ModelConfig.from_dict({**base, **changes})


RWKV7 = {
    "heads of 64": config(pattern=["rwkv7"] * 3),
    "heads of 16": config(pattern=["rwkv7"] * 2, width=48, head_size=16),
    "heads of 32": config(pattern=["rwkv7"] * 4, width=96, head_size=32, vocab_size=256),
    "heads of 128": config(pattern=["rwkv7"] * 2, width=256, head_size=128),
    "one block": config(pattern=["rwkv7"], width=64),
    "deep": config(pattern=["rwkv7"] * 12, width=64),
    "own ranks": config(
        pattern=["rwkv7"] * 3, decay_rank=24, iclr_rank=40, value_rank=16, gate_rank=48
    ),
    "narrow channel mix": config(pattern=["rwkv7"] * 2, width=64, ffn_mult=2),
}
HYBRID = {
    "4 + 2 blocks": config(),
    "one sparse block": config(pattern=list(rwkvx.hybrid_pattern(3, 1)), width=64),
    "one of each": config(pattern=["rwkv7", "sparse"], width=192, chunk_size=7, topk=5),
    "own ranks": config(decay_rank=24, iclr_rank=40, value_rank=16, gate_rank=48),
    "12 + 4 blocks": config(pattern=list(rwkvx.hybrid_pattern(12, 4)), width=64, chunk_size=64),
    "released chunks": config(chunk_size=2048, topk=3),
}


def random_model(shape: rwkvx.ModelConfig, seed: int = 1) -> rwkvx.Model:
    """Initial weights plus noise in every tensor: nothing is zero, and no gate is at rest."""
    model = rwkvx.init_weights(rwkvx.Model(shape), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, x in model.named_parameters():
            matrix = x.dim() == 2 and not name.endswith(("r_k", "emb.weight"))
            scale = 0.5 / x.shape[-1] ** 0.5 if matrix else 0.3
            x += scale * torch.randn(x.shape, generator=generator)
    return model.eval()


def random_checkpoint(shape: rwkvx.ModelConfig, dtype: torch.dtype = torch.float32) -> Checkpoint:
    return Checkpoint.of(random_model(shape)).to(dtype)


def random_ids(tokens: int, vocab: int, seed: int = 3) -> Tensor:
    return torch.randint(vocab, (tokens,), generator=torch.Generator().manual_seed(seed))


def error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    assert found.shape == expected.shape
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm())


def told(shape: rwkvx.ModelConfig) -> dict[str, Any]:
    """What a .pth file of a hybrid has no place for."""
    return {"chunk_size": shape.chunk_size, "topk": shape.topk}


def same(found: Checkpoint, expected: Checkpoint) -> bool:
    """Whether two checkpoints are equal bit for bit, dtypes included."""
    assert found.config == expected.config
    assert list(found.tensors) == list(expected.tensors)
    for name, x in expected.tensors.items():
        y = found.tensors[name]
        assert y.dtype == x.dtype, name
        assert torch.equal(_bits(y), _bits(x)), name
    return True


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)
