"""What the tests of training share: comparing weights, stopping a run."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rwkvx import Model
from rwkvx.training.trainer import Trainer

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
