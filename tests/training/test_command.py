"""`rwkvx train`: what it prints, a full disk, mistakes, plans, configs of any shape."""

import errno
import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from running import Stopped, Writer, assert_same_bits, stop_at, weights

import rwkvx
from rwkvx.cli import main
from rwkvx.errors import InputError
from rwkvx.training.config import StageConfig, field_names, parse_config, read_config
from rwkvx.training.curves import Events
from rwkvx.training.plan import make_plan
from rwkvx.training.progress import ProgressLine
from rwkvx.training.trainer import Trainer

Captured = pytest.CaptureFixture[str]


def run_command(args: list[str], capsys: Captured) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as status:
        main(["train", *args])
    out, err = capsys.readouterr()
    return int(status.value.code or 0), out, err


def test_the_command(write_config: Writer, tmp_path: Path, capsys: Captured) -> None:
    path = str(write_config())
    status, out, err = run_command([path, "--optimizer.lr", "1e-3", "--seed=5"], capsys)
    assert status == 0, err
    assert out == f"saved {tmp_path / 'run' / 'small-step-6'}\n"
    assert "step 6/6: loss " in err
    assert "step 6: loss/eval" in err
    status, out, err = run_command([path, "--optimizer.lr", "1e-3", "--seed=6"], capsys)
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert "whose seed is 5, not 6" in err
    status, out, err = run_command([path, "--seed=6", "--resume-anyway", "--steps", "6"], capsys)
    assert status == 0, err


def test_a_signal_ends_with_a_word(
    write_config: Writer, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    plain = Trainer.train_step

    def train_step(self: Trainer) -> dict[str, float]:
        signal.raise_signal(signal.SIGTERM)
        return plain(self)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    status, out, err = run_command([str(write_config())], capsys)
    assert (status, out) == (128 + signal.SIGTERM, "")
    last = err.splitlines()[-1]
    assert last == "stopped at step 1 of 6, saved: the same command goes on"


def test_a_log_is_not_filled(capsys: Captured) -> None:
    """Without a terminal: no bar, a line now and then."""
    with ProgressLine(10_000, 0, 1000) as line:
        for step in range(1, 1001):
            line.step(step, 10, 1.0)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("step 1000/1000: loss 1.0000, ")
    assert lines[0].endswith(" tok/s, 0:00:00 left")


def test_a_full_disk_leaves_the_checkpoint_before(
    write_config: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    """At whichever file of the second checkpoint it is full: one line, and the run can go on."""
    whole = Trainer(read_config(write_config("whole"))).run()
    config, folder = str(write_config()), tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(3, patch)
        with pytest.raises(Stopped):
            Trainer(read_config(config)).run()
    first = {p: p.read_bytes() for p in folder.glob("checkpoints/*/*")}
    assert len(first) > 6
    real = os.fsync
    for last in range(1, len(first)):  # the first call is that of config.yaml
        calls = iter(range(len(first)))

        def fsync(handle: int, calls: Any = calls, last: int = last) -> None:
            if next(calls) == last:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(handle)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            status, _, err = run_command([config], capsys)
        assert status == 1
        assert err.splitlines()[-1].startswith("error: ")
        assert "No space left on device" in err
        assert "Traceback" not in err
        assert {p: p.read_bytes() for p in folder.glob("checkpoints/*/*")} == first
    assert run_command([config], capsys)[0] == 0
    assert_same_bits(weights(rwkvx.load(folder / "small-step-6")), weights(whole))


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


HUGE = "[{steps: 1, length: 16777216, batch: 1048576}]"


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["--depth", "3"], 2, "no field '--depth'"),
        (["--seed"], 2, "--seed needs a value"),
        (["more"], 2, "no field 'more'"),
        (["--precision", "fp4"], 1, "precision must be one of"),
        (["--data.paths", "[gone.txt]"], 1, "text gone.txt is not there"),
        (["--stages", "[{steps: 1, length: 5000, batch: 1}]"], 1, "a sequence needs 5001"),
        (["--stages", HUGE], 1, "stages[0] reads 1,048,576 sequences of 16,777,216 tokens a step"),
        (["--model.width", "65536", "--model.ffn_mult", "64"], 1, "training this model takes"),
        (["--model.tokenizer", "world"], 1, "has 256 rows, but the tokenizer"),
        (["--model.tokenizer", "file"], 1, "lacks its tokenizer.json"),
        (["--tokenizer", "/proc/none"], 1, "/proc/none"),
        (["--device", "abacus"], 1, "device 'abacus' cannot be used"),
        (["--name", "a/b"], 1, "name must be 1 to 100 letters"),
        (["--data", "/proc/none"], 1, "is not a folder"),
    ],
    ids=str,
)
def test_mistakes_on_the_command_line(
    write_config: Writer,
    tmp_path: Path,
    capsys: Captured,
    args: list[str],
    status: int,
    message: str,
) -> None:
    code, out, err = run_command([str(write_config()), *args], capsys)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, out, len(lines)) == (status, "", 1), err
    assert message in lines[0]
    assert not (tmp_path / "run").exists()


def test_looks_beside_the_losses(write_config: Writer, tmp_path: Path) -> None:
    """Loss by position, passkeys, text, speed and memory; a stop does not write them twice."""
    stages = [{"steps": 4, "length": 150, "batch": 1}]
    path = write_config(stages=stages, probe=[300, 400], samples=["It was", ""], eval_every=2)
    for steps in ("3", "4"):
        Trainer(read_config(path, {"steps": steps})).run()
    folder = tmp_path / "run"
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    speeds = [x for x in lines if "loss/train" in x]
    assert len(speeds) == 4
    assert all(0 < x["share_of_products"] < 1.5 and x["memory_gib"] > 0.05 for x in speeds)
    looks = [x for x in lines if "loss/eval" in x]
    assert [x["step"] for x in looks] == [2, 3, 4]
    for found in looks:
        assert {"accuracy/passkey-300", "accuracy/passkey-400"} <= set(found)
        parts = {k: v for k, v in found.items() if k.startswith("position/eval/")}
        assert list(parts) == ["position/eval/0-14"]  # as much as there is held out
        assert parts["position/eval/0-14"] == pytest.approx(found["loss/eval"], rel=1e-5)
    texts = [json.loads(x) for x in (folder / "samples.jsonl").read_text().splitlines()]
    assert [(x["step"], x["prompt"]) for x in texts] == [
        (step, prompt) for step in (2, 3, 4) for prompt in ("It was", "")
    ]
    assert all(x["text"].startswith(x["prompt"]) and len(x["text"]) > 8 for x in texts)


def test_losses_by_position(write_config: Writer, tmp_path: Path) -> None:
    """They are means over parts of the sequence, which together are the loss."""
    (tmp_path / "long.txt").write_text("abc def " * 400)
    data = {"kind": "text", "paths": [str(tmp_path / "long.txt")], "eval_share": 0.5}
    stages = [{"steps": 1, "length": 160, "batch": 2}]
    trainer = Trainer(read_config(write_config(data=data, stages=stages, eval_batches=2)))
    found = trainer.evaluate()
    parts = [found[f"position/eval/{x}"] for x in ("0-64", "64-128", "128-160")]
    assert len([x for x in found if x.startswith("position")]) == 3
    sizes = (64, 64, 32)
    mean = sum(x * n for x, n in zip(parts, sizes, strict=True)) / 160
    assert mean == pytest.approx(found["loss/eval"], rel=1e-5)


def test_a_tracker_gets_the_curves(
    write_config: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    """The real one, where it is installed, without a network."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    Trainer(read_config(write_config(track="wandb"))).run()
    assert list((tmp_path / "wandb").glob("offline-run-*"))
    monkeypatch.setitem(sys.modules, "trackio", None)
    status, _, err = run_command([str(write_config("other", track="trackio"))], capsys)
    assert status == 1
    assert err.splitlines()[-1].startswith("error: this needs the package trackio")


def test_the_card(write_config: Writer, tmp_path: Path) -> None:
    path = write_config(keep="best", eval_every=1)
    Trainer(read_config(path, {"steps": "5"})).run()
    Trainer(read_config(path, {"steps": "6"})).run()
    card = (tmp_path / "run" / "small-step-6" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "rwkvx"
    results = json.loads((tmp_path / "run" / "results.json").read_text())["small-step-6"]
    for text in (
        f"{results['parameters']:,} parameters",
        "100%: kind text, paths ",
        f"| loss/eval | {results['evaluation']['loss/eval']:.4f} |",
        "sequences of up to 40 tokens",
        "Changed on the way: steps is 5, now 6.",
        results["date"],
        "## Limits",
    ):
        assert text in card
    assert "None" not in card.replace("commit None", "")
    assert rwkvx.load(tmp_path / "run" / "small-step-6", verify=True)


def test_the_config_comes_first(write_config: Writer, capsys: Captured) -> None:
    status, _, err = run_command(["--seed", "1", str(write_config())], capsys)
    assert status == 2
    assert "CONFIG" in err
    _, _, err = run_command(["no_such_config"], capsys)
    assert err.startswith("error: no config 'no_such_config': neither a .yaml file nor shipped (")


def test_the_config_is_shown(write_config: Writer, tmp_path: Path, capsys: Captured) -> None:
    """What is shown is a config that means the same."""
    mixed = [{"kind": "text", "paths": ["a"]}, {"kind": "passkey", "prose": 0, "weight": 2}]
    stages = [{"steps": 1, "length": 9, "batch": 1, "data": {"kind": "text", "paths": ["b"]}}]
    path = write_config(data=mixed, stages=stages)
    _, out, _ = run_command([str(path), "--show-config", "--seed", "8"], capsys)
    assert parse_config(yaml.safe_load(out), "shown") == read_config(path, {"seed": "8"})
    assert not (tmp_path / "run").exists()


def test_a_run_to_begin_from(tmp_path: Path, capsys: Captured) -> None:
    """Every field: those that are marked cannot be spared, the others have their defaults."""
    status, out, _ = run_command(["--show-config"], capsys)
    assert status == 0
    whole = yaml.safe_load(out)
    run = parse_config(whole, "shown")
    assert {*_paths(whole)} >= {n for n in field_names() if n not in ("model.options", "stages")}
    assert {*whole["stages"][0]} == {f.name for f in fields(StageConfig)}
    marked = [line.split(":")[0] for line in out.splitlines() if line.endswith("# required")]
    assert marked == [
        "name", "model", "  vocab_size", "  width", "  pattern", "data", "  kind", "  paths",
        "stages", "- steps", "  length", "  batch",
    ]  # fmt: skip
    for path in _paths(whole):
        without = yaml.safe_load(out)
        holder = without
        *parents, last = [int(x) if x.isdigit() else x for x in path.split(".")]
        for key in parents:
            holder = holder[key]
        del holder[last]
        optional = path in ("adapter.kind", "stages.0.data", "steps")  # namesakes
        if {last, f"  {last}", f"- {last}"} & {*marked} and not optional:
            with pytest.raises(InputError):
                parse_config(without, "shorter")
        else:
            assert parse_config(without, "shorter") == run, path
    changed = ["--seed", "7", "--show-config", "--data.kind", "tokens", "--data.path", "a"]
    status, out, err = run_command([*changed, "--init", "passkey-tiny"], capsys)
    assert status == 0, err
    run = parse_config(yaml.safe_load(out), "shown")
    assert (run.seed, run.data.parts[0].kind) == (7, "tokens")
    assert run.model == rwkvx.load("passkey-tiny").config
    assert out.count("  # required") == 8
    status, _, err = run_command(["--show-config", "--optimizer.lrr", "1"], capsys)
    assert status == 2
    assert "did you mean optimizer.lr?" in err
    status, _, err = run_command([], capsys)
    assert status == 2
    assert "--show-config" in err


def test_the_run_to_begin_from_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--model.vocab_size=256", "--model.tokenizer=bytes", "--model.width=64"]
    small.append("--model.pattern=[rwkv7, sparse]")
    stage = ["--stages.0.steps=2", "--stages.0.length=16", "--stages.0.batch=1"]
    _, out, _ = run_command(["--show-config", *small, *stage], capsys)
    Path("my.yaml").write_text(out)
    Path("my_text.txt").write_text("It was the best of times. " * 400)
    status, out, err = run_command(["my.yaml"], capsys)
    assert status == 0, err
    assert rwkvx.load(out.split()[-1]).config.width == 64


def _paths(data: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of all that stands in plain data, but for numbers and texts in lists."""
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for name, value in items:
        if isinstance(data, dict):
            yield f"{prefix}{name}"
        if isinstance(value, dict | list):
            yield from _paths(value, f"{prefix}{name}.")


def test_a_plan(write_config: Writer, tmp_path: Path, capsys: Captured) -> None:
    path = write_config(average=0.5, model={**read_config(write_config()).model.to_dict()})
    config, plan = read_config(path), make_plan(read_config(path))
    model = rwkvx.Model(config.model)
    count = sum(p.numel() for p in model.parameters())
    assert sum(plan.parameters.values()) == count
    assert plan.memory == {
        "weights": 4 * count, "gradients": 4 * count, "optimiser": 8 * count, "average": 4 * count,
    }  # fmt: skip
    assert plan.tokens == 2 * 24 * 3 + 4 * 40 * 2
    dense = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "emb" not in n)
    assert 6 * dense < plan.flops / plan.tokens < 12 * dense
    Trainer(config).run()
    sizes = {
        name: sum(p.stat().st_size for p in (tmp_path / "run" / name).glob("*.safetensors"))
        for name in ("checkpoints/step-6", "small-step-6")
    }
    assert plan.disk["model"] == pytest.approx(sizes["small-step-6"], rel=0.3)
    assert plan.disk["checkpoint"] == pytest.approx(sizes["checkpoints/step-6"], rel=0.3)
    status, out, err = run_command([str(path), "--dry-run", "--name", "unrun"], capsys)
    assert status == 0, err
    for word in (f"{count:,}", "activations", "tokens a second", "FLOPs a token", "checkpoint"):
        assert word in out
