"""Exported files: what is in them, that they are the same again, and that lm-eval runs them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rwkvx.errors import InputError
from rwkvx.tokenizers import get_tokenizer
from rwkvx_evals.long.export import export, score_row
from rwkvx_evals.long.tasks import TASKS, find_tasks
from rwkvx_evals.long.writer import Writer

NAMES = ["passkey", "niah_multivalue", "mrcr_2", "graphwalks_bfs", "babilong_qa1"]
LENGTHS = (2048, 3001)
MakeWriter = Callable[..., Writer]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    made = tmp_path_factory.mktemp("export") / "samples"
    export(made, get_tokenizer("world"), find_tasks(NAMES), LENGTHS, 3, seed=5, data=data)
    return made


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_and_hashes(folder: Path, writer: MakeWriter) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["seed"] == 5
    assert manifest["tokenizer"] == "WorldTokenizer"
    assert set(manifest["files"]) == {f"{n}-{length}.jsonl" for n in NAMES for length in LENGTHS}
    made = writer("world", seed=5)
    for name, entry in manifest["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == entry["sha256"]
        assert entry["text_gives_tokens"] is True
        task = TASKS[entry["task"]]
        for index, row in enumerate(rows(folder / name)):
            sample = task.sample(made, entry["length"], index)
            assert row["id"] == sample.id
            assert row["prompt"] == sample.text
            assert tuple(row["answers"]) == sample.answers
            assert row["tokens"] == len(sample.ids) == entry["length"] - task.answer_tokens
            assert entry["samples"][sample.id] == sample.sha256


def test_the_same_bytes_again_and_nothing_half_written(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = find_tasks(NAMES)
    # Cut off in the middle of the third file: two are whole, of the third there is nothing.
    asked = 0
    original = type(tasks[1]).sample

    def cut(self: object, *args: object) -> object:
        nonlocal asked
        asked += 1
        if asked == 2:
            raise KeyboardInterrupt
        return original(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(type(tasks[1]), "sample", cut)
    with pytest.raises(KeyboardInterrupt):
        export(tmp_path, get_tokenizer("world"), tasks, LENGTHS, 3, seed=5, data=data)
    assert sorted(path.name for path in tmp_path.glob(".*")) == []
    assert len(list(tmp_path.glob("*.jsonl"))) == 2
    assert not (tmp_path / "manifest.json").exists()
    monkeypatch.undo()
    export(tmp_path, get_tokenizer("world"), tasks, LENGTHS, 3, seed=5, data=data)
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == names
    for name in names:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_scoring_a_row(folder: Path) -> None:
    for row in rows(folder / "mrcr_2-2048.jsonl"):
        [right] = row["answers"]  # type: ignore[misc]
        assert score_row(row, right) == 1.0
        assert score_row(row, right[10:]) == 0.0


def test_what_a_user_can_mend(data: Path, tmp_path: Path) -> None:
    tokenizer = get_tokenizer("world")
    with pytest.raises(InputError, match="samples must be"):
        export(tmp_path, tokenizer, find_tasks(["passkey"]), [1024], 0, data=data)
    with pytest.raises(InputError, match="passkey needs at least"):
        export(tmp_path, tokenizer, find_tasks(["passkey"]), [32], 1, data=data)
    assert not list(tmp_path.glob("*.jsonl"))


def test_lm_eval_runs_them(folder: Path) -> None:
    """Through the whole of lm-eval, with a model that knows the answers."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    right = {row["prompt"]: row for path in folder.glob("*.jsonl") for row in rows(path)}
    prompts: list[str] = []

    class Knowing(LM):
        def generate_until(self, requests, disable_tqdm: bool = False):  # type: ignore[no-untyped-def]
            answers = []
            for prompt, settings in (request.args for request in requests):
                prompts.append(prompt)
                row = right[prompt]
                assert settings["max_gen_toks"] == TASKS[row["task"]].answer_tokens
                assert list(TASKS[row["task"]].stop) == settings["until"]
                joined = ", ".join(row["answers"])
                answers.append(f"[{joined}]" if "graph" in row["task"] else joined)
            return answers

        def loglikelihood(self, requests):  # type: ignore[no-untyped-def]
            raise NotImplementedError

        def loglikelihood_rolling(self, requests):  # type: ignore[no-untyped-def]
            raise NotImplementedError

    manager = TaskManager(include_defaults=False, include_path=str(folder))
    names = [f"{name}-{length}" for name in NAMES for length in LENGTHS]
    assert set(manager.all_tasks) == set(names)
    found = lm_eval.simple_evaluate(
        Knowing(), tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=False
    )
    assert sorted(prompts) == sorted(right)
    assert [found["results"][name]["score,none"] for name in names] == [1.0] * len(names)
