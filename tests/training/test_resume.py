"""A run after any stop: the same bits, damage named, changes told."""

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from running import MODEL, Stopped, Writer, assert_same_bits, stop_at, weights
from safetensors.torch import load_file, save_file

import rwkvx
from rwkvx import InputError
from rwkvx.training.config import read_config
from rwkvx.training.stopping import Stopped as StoppedBySignal
from rwkvx.training.trainer import Trainer


def a_model(write_config: Writer, **changes: Any) -> dict[str, Any]:
    return {**read_config(write_config()).model.to_dict(), **changes}


def interrupted(config: Path, step: int, monkeypatch: pytest.MonkeyPatch, **fields: str) -> Trainer:
    """A trainer whose run broke down before a step."""
    trainer = Trainer(read_config(config, fields))
    with monkeypatch.context() as patch:
        stop_at(step, patch)
        with pytest.raises(Stopped):
            trainer.run()
    return trainer


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "bf16"},
        {"accumulate": 2},
        {"average": 0.7},
        {"save_every": 2, "model": {"pattern": ["rwkv7", "rwkv7"]}},
        {
            "data": {"kind": "passkey", "prose": 0},
            "stages": [{"steps": 6, "length": 300, "batch": 1}],
        },
    ],
    ids=str,
)
def test_a_resumed_run_has_the_same_bits(
    write_config: Writer, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """Stopped in the stage that passes states on: weights, moments, states and data go on."""
    if "model" in changes:  # two RWKV-7 blocks: value residuals, no attention
        changes = {**changes, "model": a_model(write_config, **changes["model"])}
    whole = Trainer(read_config(write_config("whole", **changes))).run()
    path = write_config("parts", **changes)
    interrupted(path, 4, monkeypatch)
    again = Trainer(read_config(path))
    again.resume()
    assert again.step == (4 if changes.get("save_every") == 2 else 3)
    assert_same_bits(weights(again.run()), weights(whole))


def test_a_run_resumes_inside_of_an_epoch(
    write_config: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No window comes twice before all have come, wherever the run was cut."""
    stages = [{"steps": 6, "length": 40, "batch": 5}]  # the text has 39 windows
    seen: list[bytes] = []
    plain = Trainer.train_step

    def train_step(self: Trainer) -> dict[str, float]:
        from rwkvx.training.batches import step_batch

        batch = step_batch(self.source(self.config.stages[0]), self.config, self.step)
        seen.extend(bytes(row.tolist()) + bytes([i]) for i, row in enumerate(batch.inputs))
        return plain(self)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    path = write_config(stages=stages, save_every=1)
    Trainer(read_config(path, {"steps": "3"})).run()
    Trainer(read_config(path, {"steps": "6"})).run()
    once, seen[:] = list(seen), []
    Trainer(read_config(write_config("whole", stages=stages))).run()
    assert once == seen


def test_metrics_of_steps_taken_again_are_replaced(
    write_config: Writer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    interrupted(write_config(), 5, monkeypatch)
    metrics = tmp_path / "run" / "metrics.jsonl"
    with metrics.open("a") as file:
        file.write('{"step": 5, "loss')  # killed while it wrote
    Trainer(read_config(write_config())).run()
    found = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [x["step"] for x in found if "loss/train" in x] == [1, 2, 3, 4, 5, 6]


SCRIPT = """
import sys
from rwkvx.training.config import read_config
from rwkvx.training.trainer import Trainer
Trainer(read_config(sys.argv[1])).run()
"""


def start(path: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", SCRIPT, str(path)]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


def wait_for(condition: Callable[[], Any], process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 120
    while process.poll() is None and not condition() and time.monotonic() < deadline:
        time.sleep(0.001)


def test_killed_runs_end_alike(write_config: Writer, tmp_path: Path) -> None:
    """kill -9 while a checkpoint is written, then SIGTERM: the bits are those of one sitting."""
    whole = Trainer(read_config(write_config("whole"))).run()
    path, checkpoints = write_config(save_every=1), tmp_path / "run" / "checkpoints"
    process = start(path)
    wait_for(lambda: list(checkpoints.glob(".*.part/optimizer*")), process)
    process.kill()
    process.communicate()
    process = start(path)
    wait_for(lambda: list(checkpoints.glob("step-[2345]")), process)
    process.terminate()
    _, err = process.communicate(timeout=120)
    if process.returncode:  # not done before the signal came
        assert b"Stopped: stopped at step " in err
    assert_same_bits(weights(Trainer(read_config(path)).run()), weights(whole))
    assert [p.name for p in checkpoints.iterdir()] == ["step-6"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save(
    write_config: Writer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int
) -> None:
    whole = Trainer(read_config(write_config("whole"))).run()
    plain = Trainer.train_step

    def train_step(self: Trainer) -> dict[str, float]:
        if self.step == 1:
            signal.raise_signal(number)
        return plain(self)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", train_step)
        with pytest.raises(StoppedBySignal, match="stopped at step 2 of 6, saved") as caught:
            Trainer(read_config(write_config())).run()
    assert caught.value.signal == number
    assert signal.getsignal(number) is before
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-2"]
    assert_same_bits(weights(Trainer(read_config(write_config())).run()), weights(whole))


# ------------------------------------------------- damage


@pytest.mark.parametrize("name", ["model", "optimizer", "carried", "average", "progress", "config"])
@pytest.mark.parametrize("damage", ["missing", "cut", "changed"])
def test_damaged_checkpoints_are_named(
    write_config: Writer, tmp_path: Path, name: str, damage: str
) -> None:
    config = read_config(write_config(average=0.5), {"steps": "4"})
    Trainer(config).run()
    file = next((tmp_path / "run" / "checkpoints" / "step-4").glob(f"{name}.*"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[:-9] if damage == "cut" else content)
    with pytest.raises(InputError, match=rf"{file.name} is (missing|damaged).*to start again"):
        Trainer(config).run()


def test_tensors_that_were_dropped_are_missed(write_config: Writer, tmp_path: Path) -> None:
    Trainer(read_config(write_config(), {"steps": "4"})).run()
    file = tmp_path / "run" / "checkpoints" / "step-4" / "optimizer.safetensors"
    tensors = load_file(file)
    tensors.pop("optimizer.emb.weight.exp_avg")
    save_file(tensors, file)
    with pytest.raises(InputError, match=r"optimizer\.safetensors is damaged or was changed"):
        Trainer(read_config(write_config())).run()
    (file.parent / "SHA256SUMS").unlink()
    with pytest.raises(InputError, match="has no SHA256SUMS"):
        Trainer(read_config(write_config())).run()


# ------------------------------------------------- what may change


def test_what_changes_nothing_is_accepted(write_config: Writer, tmp_path: Path) -> None:
    Trainer(read_config(write_config(), {"steps": "4"})).run()
    (tmp_path / "moved.txt").write_bytes((tmp_path / "text.txt").read_bytes())
    for change in (
        {"eval_every": "1"},
        {"save_every": "1", "eval_batches": "2"},
        {"threads": "1"},
        {"device": "cpu:0"},
        {"gradient_checkpointing": "true"},
        {"data.limit_mb": "3"},
        {"data.paths": f"[{tmp_path / 'moved.txt'}]"},
        {"optimizer.decay": "0.5"},  # of the other schedule
        {"name": "other"},
    ):
        trainer = Trainer(read_config(write_config(), {"steps": "4", **change}))
        trainer.resume()
        assert trainer.step == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"optimizer.lr": "0.02"}, "whose optimizer.lr is 0.01, not 0.02"),
        ({"seed": "4"}, "whose seed is 3, not 4"),
        ({"model.topk": "3"}, "whose model.topk is 2, not 3 "),
        ({"steps": "5"}, "whose steps is 6, not 5"),
        ({"data.paths": f"[{__file__}]"}, "whose stages.0.data.content is"),
        ({"data.separate": "false"}, "whose stages.0.data.separate is True, not False"),
        ({"stages.0.steps": "3"}, "whose stages.0.steps is 2, not 3"),
        ({"stages.1.batch": "3"}, "whose stages.1.sequences is 2, not 3"),
        ({"accumulate": "2"}, "whose stages.0.sequences is 3, not 6"),
        ({"keep": "best"}, "whose keep is 'last', not 'best'"),
        ({"init": "passkey-tiny", "model": "{}", "model.tokenizer": "bytes"}, "and "),
    ],
    ids=str,
)
def test_what_changes_the_weights_is_named(
    write_config: Writer, change: dict[str, str], words: str
) -> None:
    Trainer(read_config(write_config())).run()
    with pytest.raises(InputError) as caught:
        Trainer(read_config(write_config(), change)).run()
    assert words in str(caught.value)
    assert "--resume-anyway" in str(caught.value)


def test_deliberate_changes_are_recorded(
    write_config: Writer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    interrupted(write_config(), 4, monkeypatch)
    config = read_config(write_config(), {"optimizer.lr": "0.02", "steps": "5"})
    Trainer(config).run(anyway=True)
    found = json.loads((tmp_path / "run" / "results.json").read_text())["small-step-5"]
    assert found["changes"] == [
        {"step": 3, "changed": ["optimizer.lr is 0.01, not 0.02", "steps is 6, not 5"]}
    ]
    Trainer(config).run()  # now it is this one


def test_a_run_is_extended(write_config: Writer, tmp_path: Path) -> None:
    """By more steps of the last stage, or by another stage; the model before stays."""
    stages = read_config(write_config()).to_dict()["stages"]
    Trainer(read_config(write_config())).run()
    stages[1]["steps"] = 5
    longer = Trainer(read_config(write_config(stages=stages)))
    longer.run()
    assert longer.step == 7
    stages.append({"steps": 2, "length": 32, "batch": 2})
    Trainer(read_config(write_config(stages=stages))).run()
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(found) == ["small-step-6", "small-step-7", "small-step-9"]
    assert [x["step"] for x in found["small-step-9"]["changes"]] == [6, 7]
    for name in found:
        assert rwkvx.load(tmp_path / "run" / name)


# ------------------------------------------------- numbers that are none


def test_steps_that_are_not_finite_are_skipped(
    write_config: Writer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Weights, moments and carried states are those before; the count outlives a stop."""
    config = read_config(write_config(save_every=1, most_skipped=1))  # in a row
    plain = Trainer.train_step

    def train_step(self: Trainer) -> dict[str, float]:
        if self.step not in (2, 4):
            return plain(self)
        before, carried = weights(self.model), self.carried
        hook = self.model.head.weight.register_hook(lambda g: g * torch.inf)
        found = plain(self)
        hook.remove()
        assert_same_bits(weights(self.model), before)
        assert self.carried is carried
        assert not math.isfinite(found["gradient_norm"])
        return found

    monkeypatch.setattr(Trainer, "train_step", train_step)
    trainer = Trainer(config)
    trainer.run()
    assert trainer.progress.skipped == 2
    assert json.loads((tmp_path / "run" / "results.json").read_text())[MODEL]["skipped_steps"] == 2
    again = Trainer(config)
    again.resume()
    assert again.progress.skipped == 2


def test_too_many_of_them_end_the_run(write_config: Writer) -> None:
    trainer = Trainer(read_config(write_config(most_skipped=2)))
    trainer.train_step()
    with torch.no_grad():
        trainer.model.blocks[1].ffn.value.weight[3] = torch.nan
    before = weights(trainer.model)
    for _ in range(2):
        trainer.train_step()
    with pytest.raises(InputError, match=r"the weight blocks\.1\.ffn\.value\.weight is not finite"):
        trainer.train_step()
    assert torch.equal(trainer.model.emb.weight, before["emb.weight"])
    other = Trainer(read_config(write_config("other", most_skipped=0)))
    other.model.blocks[0].ffn.key.weight.register_hook(lambda g: g * torch.nan)
    with pytest.raises(InputError, match=r"the gradient of blocks\.0\.ffn\.key\.weight is not"):
        other.train_step()
