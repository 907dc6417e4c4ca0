"""`rwkvx eval long` and `compare` from the command line, with the shipped model and others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from hf_models import save_model

from rwkvx.checkpoint.folder import save_folder
from rwkvx.errors import InputError
from rwkvx_evals.compare.command import compare_command
from rwkvx_evals.folder import MARK
from rwkvx_evals.long.command import choose, long_command
from rwkvx_evals.models.open import Options, kind_of_others, open_model


def run(*arguments: str) -> Result:
    return CliRunner().invoke(long_command, list(arguments), catch_exceptions=False)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import tiny_model

    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_folder(tiny_model(), folder)
    return folder


def test_the_list_names_every_task() -> None:
    from rwkvx_evals.long.tasks import TASKS

    lines = run("--list").output.splitlines()
    assert [line.split()[0] for line in lines] == [*TASKS, "loss_by_position"]
    assert all(len(line.split()) > 3 for line in lines)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("paskey", "passkey"),
        ("loss_by_positoin", "loss_by_position"),
        ("niah_sigle", "niah_single"),
    ],
)
def test_a_typo_shows_the_nearest_names(name: str, near: str) -> None:
    with pytest.raises(InputError, match=rf"unknown task '{name}'[:,] did you mean {near}"):
        choose(name)


def test_choosing() -> None:
    assert choose("loss") == ({}, True)
    assert choose(" passkey, loss_by_position,") == (
        {"passkey": choose("passkey")[0]["passkey"]},
        True,
    )
    assert list(choose("ruler_vt,niah_single_*")[0]) == [
        "niah_single_1", "niah_single_2", "niah_single_3", "ruler_vt",
    ]  # fmt: skip
    with pytest.raises(InputError, match="names no task"):
        choose(" , ")
    with pytest.raises(InputError, match="xyz"):
        choose("xyz")


def test_the_shipped_model_finds_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("--model", "passkey-tiny", "--lengths", "512,1k", "--samples", "3")
    assert done.exit_code == 0, done.output
    (out,) = (tmp_path / "runs").iterdir()
    assert out.name.startswith("long-passkey-tiny-")
    results = json.loads((out / "results.json").read_text())
    entry = results["tasks"]["passkey"]["lengths"]["1024"]
    assert entry["score"] == 1.0
    assert 0 < entry["stderr"] < 0.2
    assert (entry["asked"], entry["scored"], entry["failed"], entry["skipped"]) == (3, 3, 0, 0)
    for part in ("model", "weights", "command", "date", "machine", "versions", "sample_manifest"):
        assert results[part]
    assert f"report: {Path('runs') / out.name / 'report.html'}" in done.output
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert {"id", "prompt", "answer", "expected", "score"} <= set(rows[0])


def test_each_model_and_setting_has_its_folder(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    common = ("--model", str(tiny), "--lengths", "400", "--samples", "1")
    run(*common)
    run(*common, "--seed", "3")
    run(*common, "--truncate", "left")
    folders = list((tmp_path / "runs").iterdir())
    weights = open_model(str(tiny), Options()).fingerprint()[:8]
    assert len(folders) == 3
    assert all(folder.name.startswith(f"long-tiny-{weights}-") for folder in folders)
    marks = {folder: json.loads((folder / MARK).read_text())["settings"] for folder in folders}
    plain = next(f for f, s in marks.items() if s["seed"] == 0 and s["truncate"] is None)
    with pytest.raises(InputError, match=r"other settings \(seed: 0, not 5\)"):
        run(*common, "--seed", "5", "--out", str(plain))
    with pytest.raises(InputError, match="holds results of other weights"):
        run("--model", "passkey-tiny", "--lengths", "400", "--out", str(plain))


def test_not_a_number_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model("llama", tmp_path / "broken")
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight[0] = float("inf")
    model.save_pretrained(folder)
    done = run("--model", str(folder), "--lengths", "300", "--samples", "2", "--out",
               str(tmp_path / "out"))  # fmt: skip
    assert done.exit_code == 1
    assert "2 samples gave not-a-number logits" in done.output
    assert (tmp_path / "out" / "report.html").exists()


def test_two_checkpoints_are_compared(tiny: Path, tmp_path: Path) -> None:
    from tiny import tiny_model

    later = tiny_model()
    later.head.weight.data *= -1
    save_folder(later, tmp_path / "later")
    for model in (tiny, tmp_path / "later"):
        run("--model", str(model), "--tasks", "passkey,find_smallest", "--lengths", "400,600",
            "--samples", "2", "--out", str(tmp_path / f"out-{model.name}"))  # fmt: skip
    folders = [str(tmp_path / "out-tiny"), str(tmp_path / "out-later")]
    done = CliRunner().invoke(compare_command, [*folders, "--out", str(tmp_path / "compared")])
    assert done.exit_code == 0, done.output
    assert "later minus tiny:" in done.output
    found = json.loads((tmp_path / "compared" / "compare.json").read_text())
    assert {row["paired"] for row in found["compared"][0]["differences"]} == {True}


def test_a_task_written_after_the_pattern_runs(tiny: Path, tmp_path: Path) -> None:
    from importlib.util import module_from_spec, spec_from_file_location

    from needles import ask

    from rwkvx_evals.long.writer import Writer

    file = Path(__file__).parent / "long" / "colour.py"
    assert len(file.read_text().splitlines()) <= 60
    spec = spec_from_file_location("colour", file)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(module := module_from_spec(spec))
    (tmp_path / "book.txt").write_text("It was the best of times. " * 100)
    model = open_model(str(tiny), Options())
    writer = Writer(model.tokenizer, book=tmp_path / "book.txt")  # type: ignore[arg-type]
    tasks = {task.name: task for task in module.TASKS}
    found = ask(model, tmp_path / "out", tasks=tasks, lengths=(300,), samples=4, writer=writer)
    assert found["tasks"]["colour"]["lengths"]["300"]["scored"] == 4


def test_exporting(tmp_path: Path) -> None:
    done = run("--export", str(tmp_path / "e"), "--tokenizer", "world", "--tasks", "passkey",
               "--lengths", "400", "--samples", "2")  # fmt: skip
    assert done.exit_code == 0
    rows = [json.loads(s) for s in (tmp_path / "e" / "passkey-400.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["passkey-400-0", "passkey-400-1"]
    with pytest.raises(InputError, match="needs --tokenizer"):
        run("--export", str(tmp_path / "e"))
    with pytest.raises(InputError, match="no samples to export"):
        run("--export", str(tmp_path / "e"), "--tokenizer", "world", "--tasks", "loss_by_position")


def test_which_reader_a_folder_gets(tiny: Path, tmp_path: Path) -> None:
    llama = save_model("llama", tmp_path / "llama")
    assert kind_of_others(llama) == "llama"
    assert kind_of_others(tiny) is None
    assert kind_of_others(tmp_path) is None
    assert open_model(str(llama), Options()).name == "llama"
    assert open_model("passkey-tiny", Options()).name == "passkey-tiny"


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("passkey-tiny", {"model_name": "x"}, "--model-name is for endpoints"),
        ("passkey-tiny", {"device_map": "auto"}, "--device-map is for Hugging Face"),
        ("passkey-tiny", {"chat": True}, "--chat-template is for Hugging Face"),
        ("passkey-tiny", {"tokenizer": "nope"}, "--tokenizer of a model of ours is one of"),
        ("http://localhost:1/v1", {}, "an endpoint needs --tokenizer"),
        ("http://localhost:1/v1", {"tokenizer": "nope"}, "is neither world, bytes nor a folder"),
        ("no-such-model", {}, "no model 'no-such-model'"),
        ("passkey-tiny", {"device": "cuda:77"}, "cannot be used"),
    ],
)
def test_what_does_not_fit_a_model(model: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        open_model(model, Options(**options))


def test_a_model_is_needed() -> None:
    with pytest.raises(InputError, match="--model is missing"):
        run("--tasks", "passkey")
