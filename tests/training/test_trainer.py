"""Training itself: exact resumption, accumulation, state passing, what is written, the command."""

import errno
import json
import os
import resource
from functools import partial
from pathlib import Path

import pytest
import torch
from running import Stopped, Writer, assert_same_bits, stop_at, weights
from torch import Tensor

import rwkvx
from rwkvx import InputError, Model
from rwkvx.cli import main
from rwkvx.training import trainer as trainer_module
from rwkvx.training.config import read_config
from rwkvx.training.data import Batch
from rwkvx.training.events import Events
from rwkvx.training.trainer import Trainer


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "bf16"},
        {"accumulate": 2},
        {"average": 0.7},
        {"save_every": 2, "model": None},
    ],
    ids=str,
)
def test_a_resumed_run_has_the_same_bits(
    write_config: Writer, monkeypatch: pytest.MonkeyPatch, changes: dict
) -> None:
    """Stopped in the stage that passes states on: weights, moments, states and data go on."""
    if "model" in changes:  # two RWKV-7 blocks: value residuals, no attention
        changes = {**changes, "model": {**_model(write_config), "pattern": ["rwkv7", "rwkv7"]}}
    whole = Trainer(read_config(write_config("whole", **changes))).run()
    config = read_config(write_config("parts", **changes))
    with monkeypatch.context() as patch:
        stop_at(4, patch)
        with pytest.raises(Stopped):
            Trainer(config).run()
    again = Trainer(config)
    assert again.step == (4 if changes.get("save_every") == 2 else 3)
    assert_same_bits(weights(again.run()), weights(whole))


def _model(write_config: Writer) -> dict:
    return read_config(write_config()).model.to_dict()


def test_training_learns(write_config: Writer) -> None:
    stages = [{"steps": 40, "length": 32, "batch": 4}]
    trainer = Trainer(read_config(write_config(stages=stages, eval_every=100, save_every=100)))
    losses = [trainer.train_step() for _ in range(40)]
    assert losses[0] == pytest.approx(5.545, abs=0.4)  # log 256, and the head's own spread
    assert sum(losses[-5:]) / 5 < 3.2


def test_what_a_run_leaves_behind(write_config: Writer, tmp_path: Path) -> None:
    model = Trainer(read_config(write_config())).run()
    folder = tmp_path / "run"
    assert sorted(p.name for p in folder.iterdir() if p.name != "tensorboard") == [
        "model", "progress.json", "step-6",
    ]  # fmt: skip
    assert_same_bits(weights(rwkvx.load(folder / "model")), weights(model))
    assert json.loads((folder / "progress.json").read_text())["step"] == 6
    before = (folder / "step-6" / "model.safetensors").stat().st_mtime_ns
    again = Trainer(read_config(write_config()))
    assert again.step == 6
    again.run()
    assert (folder / "step-6" / "model.safetensors").stat().st_mtime_ns == before


def test_accumulation_equals_a_larger_batch(write_config: Writer) -> None:
    """Two micro-batches of 2 have the gradient of one batch of the same 4 sequences."""
    stages = [{"steps": 3, "length": 24, "batch": 2}]
    small = Trainer(read_config(write_config("a", stages=stages, accumulate=2)))
    large = Trainer(read_config(write_config("b", stages=stages)))
    source = small.source

    class Joined:
        def batch(self, stage, seed):  # type: ignore[no-untyped-def]
            parts = [source.batch(stage, (*seed[:3], micro)) for micro in range(2)]
            batch = type(parts[0])(*(torch.cat(x) for x in zip(*parts, strict=True)))
            return batch._replace(weights=batch.weights / 2)

    large.source = Joined()
    for model in (small.model, large.model):  # float64: Adam amplifies the roundings of zero
        model.double()
    for _ in range(3):
        assert small.train_step() == pytest.approx(large.train_step(), rel=1e-6)
    for (name, a), b in zip(small.model.named_parameters(), large.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


def test_loss_by_tiles_is_the_plain_loss(
    write_config: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and all gradients of a step on random tokens, every one of another weight."""
    stages = [{"steps": 1, "length": 24, "batch": 3}]
    optimizer = {"lr": 0.01, "warmup": 2, "clip": 1e9}
    config = read_config(write_config(stages=stages, optimizer=optimizer))
    ids, chances = torch.randint(256, (2, 3, 24)), torch.rand(3, 24)
    batch = Batch(ids[0], ids[1], chances, torch.zeros(3, 24, dtype=torch.bool))

    def plain(x: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        chosen = (x @ weight.T).log_softmax(1).gather(1, targets[:, None])[:, 0]
        return -(chosen * weights).sum()

    results = []
    for loss in (plain, partial(trainer_module.linear_cross_entropy, most_logits=20 * 256)):
        monkeypatch.setattr(trainer_module, "linear_cross_entropy", loss)
        trainer = Trainer(config)
        trainer.model.double()
        monkeypatch.setattr(trainer.source, "batch", lambda *_: batch)
        monkeypatch.setattr(trainer.optimizer, "step", lambda: None)
        monkeypatch.setattr(trainer.optimizer, "zero_grad", lambda **_: None)
        total = torch.tensor(trainer.train_step(), dtype=torch.float64)
        results.append([total, *(x.grad for x in trainer.model.parameters())])
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_states_are_passed_on(write_config: Writer) -> None:
    """With share 1 every row starts from a carried state, with 0 from nothing."""
    for share, expected in ((1.0, True), (0.0, False)):
        stages = [{"steps": 4, "length": 16, "batch": 3, "state_passing": share}]
        trainer = Trainer(read_config(write_config(stages=stages)))
        assert trainer._initial_state(trainer.config.stages[0], 0) is None
        trainer.train_step()
        state = trainer._initial_state(trainer.config.stages[0], 0)
        assert (state is not None) == expected
        if state is not None:
            assert state.length == 0
            assert all(row.any() for row in state.blocks[0].wkv)  # type: ignore[union-attr]
            assert not state.blocks[0].ffn_shift.requires_grad
            assert state.blocks[1].cached == ()  # type: ignore[union-attr]


def test_some_rows_start_afresh(write_config: Writer) -> None:
    stages = [{"steps": 4, "length": 16, "batch": 64, "state_passing": 0.5}]
    trainer = Trainer(read_config(write_config(stages=stages)))
    trainer.train_step()
    state = trainer._initial_state(trainer.config.stages[0], 0)
    again = trainer._initial_state(trainer.config.stages[0], 0)
    assert state is not None
    assert again is not None
    carried = [bool(row.any()) for row in state.blocks[0].wkv]  # type: ignore[union-attr]
    assert 16 < sum(carried) < 48
    for x, y in zip(state.blocks[0], again.blocks[0], strict=True):
        assert torch.equal(x, y)


def test_evaluation_is_always_the_same(write_config: Writer) -> None:
    trainer = Trainer(read_config(write_config()))
    first = trainer.evaluate()
    assert first == trainer.evaluate()
    assert first["loss/eval"] == pytest.approx(5.545, abs=0.4)
    assert all(p.grad is None for p in trainer.model.parameters())


def test_passkey_accuracy_is_of_whole_answers(write_config: Writer) -> None:
    stages = [{"steps": 1, "length": 300, "batch": 4}]
    data = {"kind": "passkey", "prose": 0.0}
    trainer = Trainer(read_config(write_config(stages=stages, data=data)))
    plain = trainer.model

    class Knowing(Model):
        def forward(self, ids, state=None, **kwargs):  # type: ignore[no-untyped-def]
            batch = trainer.source.batch(trainer.config.stages[0], (3, 1, 0))
            logits = torch.nn.functional.one_hot(batch.targets, 256).float()
            logits[0, batch.answers[0].nonzero()[1]] = 0  # one digit of one row is wrong
            return logits, state

    assert trainer.evaluate()["accuracy/standard"] == 0.0
    trainer.model = Knowing(plain.config)
    assert trainer.evaluate()["accuracy/standard"] == 0.75
    trainer.model = plain


def test_starting_from_a_model(write_config: Writer, tmp_path: Path) -> None:
    first = Trainer(read_config(write_config("first"))).run()
    init = str(tmp_path / "first" / "model")
    longer = Trainer(read_config(write_config("second", init=init), {"model.topk": "3"}))
    assert_same_bits(weights(longer.model), weights(first))
    assert longer.model.config.topk == 3
    with pytest.raises(InputError, match=r"emb\.weight is \[256, 16\], expected \[256, 32\]"):
        Trainer(read_config(write_config("third", init=init), {"model.width": "32"}))


def test_another_config_is_refused(write_config: Writer) -> None:
    Trainer(read_config(write_config())).run()
    for change in ({"optimizer.lr": "0.02"}, {"seed": "4"}, {"model.topk": "3"}, {"steps": "5"}):
        with pytest.raises(InputError, match="holds a run of another config"):
            Trainer(read_config(write_config(), change))
    for change in ({"eval_every": "1"}, {"save_every": "1"}, {"threads": "1"}, {"name": "other"}):
        assert Trainer(read_config(write_config(), change)).step == 6


@pytest.mark.parametrize("damage", ["progress", "mapping", "weights", "missing", "optimizer"])
def test_damaged_checkpoints_are_named(write_config: Writer, tmp_path: Path, damage: str) -> None:
    Trainer(read_config(write_config())).run()
    folder = tmp_path / "run"
    file = {
        "progress": folder / "progress.json",
        "mapping": folder / "progress.json",
        "weights": folder / "step-6" / "model.safetensors",
        "missing": folder / "step-6" / "model.safetensors",
        "optimizer": folder / "step-6" / "optimizer.safetensors",
    }[damage]
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(b"3" if damage == "mapping" else file.read_bytes()[:40])
    with pytest.raises(InputError, match=file.name.replace(".", r"\.")):
        Trainer(read_config(write_config()))


def test_a_run_that_diverges_stops(write_config: Writer, tmp_path: Path) -> None:
    """Before the weights are touched, and with its last checkpoint left as it is."""
    trainer = Trainer(read_config(write_config()))
    with torch.no_grad():
        trainer.model.head.weight[3] = torch.nan
    before = trainer.model.emb.weight.clone()
    with pytest.raises(InputError, match=r"loss of step 1 is nan: lower optimizer\.lr"):
        trainer.train_step()
    assert torch.equal(trainer.model.emb.weight, before)


def test_unusable_devices_are_refused(write_config: Writer) -> None:
    with pytest.raises(InputError, match="device 'abacus' cannot be used"):
        Trainer(read_config(write_config(device="abacus")))


def run_command(args: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as status:
        main(["train", *args])
    out, err = capsys.readouterr()
    return int(status.value.code or 0), out, err


def test_the_command(
    write_config: Writer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write_config())
    status, out, err = run_command([path, "--optimizer.lr", "1e-3", "--seed=5"], capsys)
    assert status == 0, err
    assert out == f"saved {tmp_path / 'run' / 'model'}\n"
    assert "loss=" in err
    assert "tok/s" in err
    assert "step 6: loss/eval" in err
    status, out, err = run_command([path, "--optimizer.lr", "1e-3", "--seed=6"], capsys)
    assert status == 1
    assert err.startswith("error: ")
    assert "another config" in err


def test_a_full_disk_leaves_the_checkpoint_before(
    write_config: Writer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """At whichever file of the second checkpoint it is full: one line, and the run can go on."""
    whole = Trainer(read_config(write_config("whole"))).run()
    config, folder = str(write_config()), tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(3, patch)
        with pytest.raises(Stopped):
            Trainer(read_config(config)).run()
    first = {p: p.read_bytes() for p in folder.glob("step-3/*")} | {
        folder / "progress.json": (folder / "progress.json").read_bytes()
    }
    written = len(first)
    real = os.fsync
    for last in range(written):
        calls = iter(range(written))

        def fsync(handle: int, calls=calls, last=last) -> None:  # type: ignore[no-untyped-def]
            if next(calls) == last:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(handle)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            status, _, err = run_command([config], capsys)
        assert status == 1
        assert err.splitlines()[-1].startswith(f"error: cannot write {folder}")
        assert err.endswith(": No space left on device\n")
        assert "Traceback" not in err
        files = [p for p in folder.rglob("*") if p.is_file() and p.parent.name != "tensorboard"]
        assert {p: p.read_bytes() for p in files} == first
    assert run_command([config], capsys)[0] == 0
    assert_same_bits(weights(rwkvx.load(folder / "model")), weights(whole))


def test_events_end_whole_on_a_full_disk(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = Events(tmp_path / "new" / "folder")
    events.add_scalar("loss", 0.5, 1)
    size = events.path.stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, hard))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            events.add_scalar("loss", 0.4, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename == str(events.path)
    assert events.path.stat().st_size == size
    events.add_scalar("loss", 0.25, 3)
    read = accumulator.EventAccumulator(str(events.path.parent)).Reload()
    assert [(x.step, x.value) for x in read.Scalars("loss")] == [(1, 0.5), (3, 0.25)]


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["--depth", "3"], 2, "no field --depth"),
        (["--seed"], 2, "--seed needs a value"),
        (["more"], 2, "no field more"),
        (["--precision", "fp4"], 1, "precision must be one of"),
        (["--data.paths", "[gone.txt]"], 1, "text gone.txt is not there"),
        (["--stages", "[{steps: 1, length: 5000, batch: 1}]"], 1, "a sequence needs 5001"),
        (["--model.tokenizer", "world"], 1, "vocab"),
        (["--data", "/nowhere/at/all"], 1, "is not a folder"),
    ],
    ids=str,
)
def test_mistakes_on_the_command_line(
    write_config: Writer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    args: list[str],
    status: int,
    message: str,
) -> None:
    code, out, err = run_command([str(write_config()), *args], capsys)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, out, len(lines)) == (status, "", 1), err
    assert message in lines[0]
    assert not (tmp_path / "run" / "model").exists()


def test_the_config_comes_first(write_config: Writer, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run_command(["--seed", "1", str(write_config())], capsys)
    assert status == 2
    assert "CONFIG" in err
    assert run_command(["no_such_config"], capsys)[2].startswith("error: cannot read config")
