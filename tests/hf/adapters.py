"""A small hybrid behind the Hugging Face interface, and prompts of unequal lengths."""

import random

import torch
from small import HYBRID, random_model
from torch import Tensor

from rwkvx import Model, ModelConfig
from rwkvx.hf import RwkvxConfig, RwkvxForCausalLM

# Chunks of 16, three of them read; 256 ids as the byte tokenizer has. `key_conv` is a fourth state.
CONFIG = ModelConfig.from_dict({**HYBRID.to_dict(), "vocab_size": 256, "key_conv": 3})
# Shorter and longer than topk · chunk_size = 48 tokens.
LENGTHS = [70, 1, 17, 100, 16]


def adapter(dtype: torch.dtype = torch.float64, config: ModelConfig = CONFIG) -> RwkvxForCausalLM:
    """Random weights, float64 unless told, in evaluation mode."""
    hf = RwkvxForCausalLM(RwkvxConfig(**config.to_dict(), dtype=dtype)).to(dtype)
    hf.model.load_state_dict(random_model(config).state_dict())
    with torch.no_grad():
        hf.model.head.weight *= 8  # answers that differ
    return hf.eval()


def core(hf: RwkvxForCausalLM) -> Model:
    return hf.model


def prompts(seed: int = 0, lengths: list[int] = LENGTHS) -> list[Tensor]:
    """Each [1, T]; without id 0, which ends and pads."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 256, (1, n), generator=generator) for n in lengths]


def padded(rows: list[Tensor], side: str) -> dict[str, Tensor]:
    """A batch with its mask; padding "left", "right", or "holes" anywhere. Pads are random ids."""
    width = max(row.shape[1] for row in rows)
    ids = torch.randint(1, 256, (len(rows), width), generator=torch.Generator().manual_seed(9))
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        n = row.shape[1]
        places = {
            "left": range(width - n, width),
            "right": range(n),
            "holes": sorted(random.Random(i).sample(range(width), n)),
        }[side]
        ids[i, list(places)], mask[i, list(places)] = row[0], 1
    return {"input_ids": ids, "attention_mask": mask}
