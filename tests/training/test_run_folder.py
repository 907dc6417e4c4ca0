"""A run folder: what it holds, one owner, nothing overwritten, no leftovers."""

import json
import os
import shutil
from pathlib import Path

import pytest
from running import MODEL, Writer, assert_same_bits, weights

import rwkvx
from rwkvx import InputError
from rwkvx.training.config import read_config
from rwkvx.training.curves import Events
from rwkvx.training.run_folder import RunFolder
from rwkvx.training.trainer import Trainer


def test_what_a_run_leaves_behind(write_config: Writer, tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        model = Trainer(read_config(write_config())).run()
    finally:
        os.umask(old)
    folder = tmp_path / "run"
    assert sorted(p.name for p in folder.iterdir() if p.name != "tensorboard") == [
        ".lock", "checkpoints", "config.yaml", "metrics.jsonl", "results.json", MODEL,
    ]  # fmt: skip
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-6"]
    modes = {p.stat().st_mode & 0o777 for p in folder.rglob("*") if p.is_file()}
    assert modes == {0o640}
    assert_same_bits(weights(rwkvx.load(folder / MODEL, verify=True)), weights(model))
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}
    assert_same_bits(weights(Trainer(read_config(write_config())).run()), weights(model))
    assert [path.name for path in before if path.read_bytes() != before[path]] == []


def test_curves_that_begin_in_one_second_have_files_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setattr("time.time", lambda: 1.0e9)
    first = Events(tmp_path)
    first.add_scalar("loss", 1.0, 1)
    before = first.path.read_bytes()
    second = Events(tmp_path)
    assert second.path != first.path
    assert first.path.read_bytes() == before


def test_results_say_how_a_model_came_about(write_config: Writer, tmp_path: Path) -> None:
    Trainer(read_config(write_config())).run()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    found = results[MODEL]
    assert {"date", "command", "machine", "commit", "torch"} <= set(found)
    assert found["tokens"] == 2 * 24 * 3 + 4 * 40 * 2
    assert found["evaluation"]["loss/eval"] > 0
    again = tmp_path / "again.yaml"
    shutil.copy(tmp_path / "run" / "config.yaml", again)
    assert read_config(again) == read_config(write_config())
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss/train" in line]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "loss/eval" in line] == [3, 6]


def test_a_model_is_not_overwritten(write_config: Writer, tmp_path: Path) -> None:
    Trainer(read_config(write_config())).run()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(InputError, match=f"{MODEL} exists already: choose another --out or --name"):
        Trainer(read_config(write_config(), {"seed": "9"})).run()
    Trainer(read_config(write_config(), {"seed": "9", "name": "other"})).run()
    assert set(json.loads((tmp_path / "run" / "results.json").read_text())) == {
        MODEL, "other-step-6",
    }  # fmt: skip


# ------------------------------------------------- whose folder it is


def test_one_owner(write_config: Writer, tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run").owned():
        with pytest.raises(InputError, match=rf"going on \(process {os.getpid()}\)"):
            Trainer(read_config(write_config())).run()
        Trainer(read_config(write_config("other"))).run()
    Trainer(read_config(write_config())).run()


def test_leftovers_are_removed(write_config: Writer, tmp_path: Path) -> None:
    """Of a process that was killed between any two operations on files."""
    Trainer(read_config(write_config(), {"steps": "3"})).run()
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.copytree(checkpoints / "step-3", checkpoints / "step-1")
    shutil.copytree(checkpoints / "step-3", checkpoints / ".0123.part")
    shutil.copytree(checkpoints / "step-3", checkpoints / ".step-2.part")
    (tmp_path / "run" / ".abc.part.json").write_text("half")
    Trainer(read_config(write_config())).run()
    assert [p.name for p in checkpoints.iterdir()] == ["step-6"]
    assert not list((tmp_path / "run").glob("*.part*"))
