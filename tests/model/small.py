"""Small models whose every parameter matters, and how far apart two results are."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

import rwkvx
from rwkvx import Model, ModelConfig

HYBRID = ModelConfig(
    vocab_size=40,
    width=32,
    head_size=8,
    pattern=("rwkv7", "sparse", "rwkv7", "sparse"),
    chunk_size=16,
    topk=3,
    decay_rank=8,
    iclr_rank=8,
    value_rank=8,
    gate_rank=8,
    ffn_mult=2,
    tokenizer="bytes",
)
VARIANTS = {
    "plain": {},
    "key_conv": {"key_conv": 4},
    "gqa": {"sparse_kv_heads": 2},
    "conv_gqa": {"key_conv": 3, "sparse_kv_heads": 1, "chunk_size": 7, "topk": 2},
    "sparse_first": {"pattern": ("sparse", "rwkv7", "rwkv7", "sparse")},
    "only_rwkv7": {"pattern": ("rwkv7", "rwkv7")},
    "only_sparse": {"pattern": ("sparse",)},
    "window": {"pattern": ("rwkv7", "window", "rwkv7", "sparse"), "window": 20},
    "only_window": {"pattern": ("window",), "window": 13, "sparse_kv_heads": 2},
}
TOKENS = 240  # five times topk · chunk_size


def variant(name: str) -> ModelConfig:
    return ModelConfig.from_dict({**HYBRID.to_dict(), **VARIANTS[name]})


def random_model(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> Model:
    """Initial weights with noise on each of them: no zero hides a mistake."""
    model = rwkvx.init_weights(Model(config), seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if name == "emb.weight" else 0.3 if parameter.dim() == 1 else 0.15
            parameter += scale * torch.randn_like(parameter)
    return model.to(dtype).eval()


def random_ids(tokens: int = TOKENS, batch: int = 2, seed: int = 0, vocab: int = 40) -> Tensor:
    torch.manual_seed(seed)
    return torch.randint(vocab, (batch, tokens))


def error(x: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference over that of the exact values."""
    assert x.shape == exact.shape
    x, exact = x.detach().double(), exact.detach().double()
    return float((x - exact).norm() / exact.norm())


@contextmanager
def triton_everywhere() -> Iterator[None]:
    """Here "auto" takes the Triton kernels on any device: without a GPU, interpreted."""
    with patch("rwkvx_kernels.dispatch.on_gpu", lambda device: True):
        yield
