"""lm-eval's own tasks on local data, whole runs, and what is said when there is no data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model

from rwkvx.data.folder import data_folder
from rwkvx.errors import InputError

pytest.importorskip("lm_eval")

from rwkvx_evals.lm.evaluate import evaluate
from rwkvx_evals.lm.tasks import definition_file, load_tasks

REPORTS = ("report.md", "results.json", "scores.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder with a few items of each task."""
    root = tmp_path / "data"
    (root / "lambada_openai").mkdir(parents=True)
    (root / "piqa").mkdir()
    texts = [f"Story {n}: he opened the door and saw the {w}" for n, w in enumerate("abcde")]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (root / "lambada_openai" / "lambada_test.jsonl").write_text(rows)
    questions = [
        {"goal": f"How to do {n}?", "sol1": "Like this.", "sol2": "Not at all."} for n in range(4)
    ]
    (root / "piqa" / "valid.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    (root / "piqa" / "valid-labels.lst").write_text("0\n1\n1\n0\n")
    return root


def run(out: Path, folder: Path, model: Any = None, **more: Any) -> dict[str, Any]:
    model = model or tiny_model()
    tasks = ["lambada_openai", "piqa"]
    return evaluate(model, "tiny", tasks, out, folder=folder, quiet=True, **more)


def test_a_whole_run(tmp_path: Path, folder: Path) -> None:
    results = run(tmp_path / "out", folder)
    table = {(row["task"], row["metric"]): row for row in results["table"]}
    assert set(table) == {
        ("lambada_openai", "perplexity"), ("lambada_openai", "acc"),
        ("piqa", "acc"), ("piqa", "acc_norm"),
    }  # fmt: skip
    assert table["piqa", "acc"]["n"] == 4
    assert results["requests"]["piqa"] == {
        "asked": 8, "scored": 8, "failed": 0, "oom": 0, "invalid": 0,
    }  # fmt: skip
    assert results["data"]["piqa"] == f"folder {folder}"
    text = (tmp_path / "out" / "report.md").read_text()
    assert f"Data of piqa: folder {folder}" in text
    assert (tmp_path / "out" / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_the_definitions_are_lm_evals_own(folder: Path) -> None:
    loaded = load_tasks(["piqa", "lambada_openai"], folder)
    piqa, lambada = loaded.tasks
    assert piqa.doc_to_text(piqa.validation_docs()[1]) == "Question: How to do 1?\nAnswer:"
    assert [doc["label"] for doc in piqa.validation_docs()] == [0, 1, 1, 0]
    document = lambada.test_docs()[0]
    assert lambada.doc_to_text(document).endswith("saw the")
    assert lambada.doc_to_target(document) == " a"


def test_resuming_gives_the_same_bytes(tmp_path: Path, folder: Path) -> None:
    run(tmp_path / "whole", folder)
    lines = (tmp_path / "whole" / "requests.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "requests.jsonl").write_bytes(b"".join(lines[:5]) + lines[5][:30])
    run(tmp_path / "cut", folder)
    for name in REPORTS:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_task_with_invalid_requests_has_no_score(tmp_path: Path, folder: Path) -> None:
    import torch

    model = tiny_model()
    with torch.no_grad():
        model.emb.weight[ord("?")] = float("nan")
    results = run(tmp_path / "out", folder, model)
    table = {(row["task"], row["metric"]): row["value"] for row in results["table"]}
    assert table["piqa", "acc"] is None
    assert table["lambada_openai", "acc"] is not None
    assert results["requests"]["piqa"]["invalid"] == 8
    assert (
        "| piqa | 8 | 0 | 8 (0 out of memory, 8 not a number) |"
        in (tmp_path / "out" / "report.md").read_text()
    )


def test_a_limit_is_said(tmp_path: Path, folder: Path) -> None:
    results = run(tmp_path / "out", folder, limit=2)
    assert {row["n"] for row in results["table"]} == {2}
    assert "Only the first 2 items" in (tmp_path / "out" / "report.md").read_text()


def test_without_data_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Couldn't reach the Hub\nand more")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(InputError) as caught:
        load_tasks(["piqa"], None)
    message = str(caught.value)
    assert "piqa/valid.jsonl and piqa/valid-labels.lst with --data or RWKVX_DATA" in message
    assert "Couldn't reach the Hub" in message
    assert "\n" not in message
    with pytest.raises(InputError, match=f"folder {folder} holds lambada_openai, piqa"):
        load_tasks(["piqa", "hellaswag"], folder)
    (folder / "piqa" / "valid.jsonl").unlink()
    with pytest.raises(InputError, match=f"folder {folder} holds lambada_openai "):
        load_tasks(["piqa"], folder)


def test_damaged_data(folder: Path) -> None:
    (folder / "piqa" / "valid-labels.lst").write_text("0\n1\n")
    with pytest.raises(InputError, match="2 labels for 4 questions"):
        load_tasks(["piqa"], folder)
    (folder / "lambada_openai" / "lambada_test.jsonl").write_text('{"text": ')
    with pytest.raises(InputError, match="is not JSON lines"):
        load_tasks(["lambada_openai"], folder)
    (folder / "lambada_openai" / "lambada_test.jsonl").unlink()
    with pytest.raises(InputError, match="cannot read"):
        load_tasks(["lambada_openai"], folder)


def test_definitions_are_found_by_name() -> None:
    found = definition_file("piqa")
    assert found is not None
    assert found.name == "piqa.yaml"
    assert definition_file("no_such_task_at_all") is None


def test_the_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RWKVX_DATA", raising=False)
    assert data_folder(None) is None
    monkeypatch.setenv("RWKVX_DATA", str(tmp_path))
    assert data_folder(None) == tmp_path
    with pytest.raises(InputError, match=r"\(from --data\) is not a folder"):
        data_folder(str(tmp_path / "none"))


def test_the_real_data_has_all_items() -> None:
    folder = data_folder(None)
    if folder is None:
        pytest.skip("RWKVX_DATA is not set")
    piqa, lambada = load_tasks(["piqa", "lambada_openai"], folder).tasks
    assert len(piqa.validation_docs()) == 1838
    assert len(lambada.test_docs()) == 5153
