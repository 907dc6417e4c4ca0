"""What the tests of training share: comparing weights, stopping a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rwkvx import Model
from rwkvx.training.trainer import Trainer

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 20
BASE: dict[str, Any] = {
    "name": "small",
    "seed": 3,
    "model": {
        "vocab_size": 256,
        "tokenizer": "bytes",
        "width": 16,
        "head_size": 8,
        "pattern": ["rwkv7", "sparse"],
        "chunk_size": 8,
        "topk": 2,
        "key_conv": 2,
        "ffn_mult": 2,
        "decay_rank": 4,
        "iclr_rank": 4,
        "value_rank": 4,
        "gate_rank": 4,
    },
    "data": {"kind": "text", "paths": ["text.txt"]},
    "optimizer": {"lr": 0.01, "warmup": 2},
    "stages": [
        {"steps": 2, "length": 24, "batch": 3},
        {"steps": 4, "length": 40, "batch": 2, "state_passing": 0.5},
    ],
    "eval_every": 3,
    "eval_batches": 1,
    "save_every": 3,
}

MODEL = "small-step-6"

Writer = Callable[..., Path]


def weights(model: Model) -> dict[str, torch.Tensor]:
    return {n: x.detach().clone() for n, x in model.state_dict().items()}


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class Stopped(Exception):
    pass


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every trainer breaks down before its step number `step`."""
    plain = Trainer.train_step

    def train_step(self: Trainer) -> dict[str, float]:
        if self.step == step:
            raise Stopped
        return plain(self)

    monkeypatch.setattr(Trainer, "train_step", train_step)
