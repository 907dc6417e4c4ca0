"""What is kept: the average or the best of the weights, the last checkpoints."""

import shutil
from pathlib import Path

import pytest
import torch
from running import Stopped, Writer, assert_same_bits, stop_at, weights

import rwkvx
from rwkvx import InputError
from rwkvx.training.config import read_config
from rwkvx.training.trainer import Trainer


def test_the_average_of_the_weights_becomes_the_model(
    write_config: Writer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected: dict[str, torch.Tensor] = {}
    plain = Trainer.train_step

    def train_step(self: Trainer) -> dict[str, float]:
        found = plain(self)
        for name, x in weights(self.model).items():
            expected[name] = 0.7 * expected[name] + 0.3 * x if name in expected else x
        return found

    monkeypatch.setattr(Trainer, "train_step", train_step)
    trainer = Trainer(read_config(write_config(average=0.7)))
    trained = trainer.run()
    assert not torch.equal(trained.emb.weight, trainer.model.emb.weight)
    for name, x in weights(rwkvx.load(tmp_path / "run" / "small-step-6")).items():
        torch.testing.assert_close(x, expected[name])


@pytest.mark.parametrize("stopped", [0, 5])
def test_the_best_of_the_last_stage_becomes_the_model(
    stopped: int, write_config: Writer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    losses = {1: 0.1, 2: 0.1, 3: 3.0, 4: 1.0, 5: 2.0, 6: 4.0}
    seen: dict[int, dict[str, torch.Tensor]] = {}

    def evaluate(self: Trainer) -> dict[str, float]:
        seen[self.step] = weights(self.model)
        return {"loss/eval": losses[self.step]}

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    stages = [{"steps": n, "length": 16, "batch": 2} for n in (2, 4)]
    every = {"eval_every": 1, "save_every": 1}
    config = read_config(write_config(stages=stages, keep="best", **every))
    if stopped:
        with monkeypatch.context() as patch:
            stop_at(stopped, patch)
            with pytest.raises(Stopped):
                Trainer(config).run()
    assert_same_bits(weights(Trainer(config).run()), seen[4])
    assert_same_bits(weights(rwkvx.load(tmp_path / "run" / "small-step-6")), seen[4])
    left = {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()}
    assert left == {"step-6", "best-4"}  # that of step 3 is worse, and of no use


def test_a_run_that_ends_before_the_last_stage_has_a_best_too(
    write_config: Writer, tmp_path: Path
) -> None:
    stages = [{"steps": n, "length": 16, "batch": 2} for n in (2, 4)]
    config = read_config(write_config(stages=stages, keep="best", steps=1, eval_every=1))
    model = Trainer(config).run()
    assert_same_bits(weights(rwkvx.load(tmp_path / "run" / "small-step-1")), weights(model))


def test_the_last_checkpoints_stay(write_config: Writer, tmp_path: Path) -> None:
    """Of a damaged one, the one before is named as what is gone on from; with the same bits."""
    config = read_config(write_config(save_every=1, keep_checkpoints=3))
    whole = Trainer(config).run()
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step-4", "step-5", "step-6"]
    shutil.rmtree(tmp_path / "run" / "small-step-6")
    file = checkpoints / "step-6" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match="to go on from the one before"):
        Trainer(config).run()
    shutil.rmtree(checkpoints / "step-6")
    assert_same_bits(weights(Trainer(config).run()), weights(whole))
