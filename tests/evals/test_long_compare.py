"""Finished runs against one another: pairs, errors, what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from needles import TASKS as NEEDLES
from needles import SmallWriter, ask, oracle
from reports import TASKS, make_run
from tiny import tiny_model

from rwkvx.errors import InputError
from rwkvx_evals.compare.command import compare_command
from rwkvx_evals.compare.pairs import Run, compare, read_runs
from rwkvx_evals.files import write_json
from rwkvx_evals.long.plan import Settings
from rwkvx_evals.long.results import write_rows
from rwkvx_evals.models.own import OwnModel


def save(folder: Path, run: tuple[dict[str, Any], list[dict[str, Any]]]) -> Path:
    results, rows = run
    results.pop("loss_by_position", None)
    write_json(folder / "results.json", results)
    write_rows(rows, folder / "samples.jsonl")
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [save(tmp_path / f"run{n}", make_run(n, f"model-{n}")) for n in (1, 2, 3)]


def test_differences_of_real_runs(tmp_path: Path) -> None:
    a = ask(oracle(memory=700), tmp_path / "a", samples=10)
    b = ask(oracle(), tmp_path / "b", samples=10)
    first, second = read_runs([tmp_path / "a", tmp_path / "b"])
    # Both are oracles: the folders tell them apart.
    assert (first.label, second.label) == ("a", "b")
    rows = {(r["task"], r["length"]): r for r in compare(first, second)}
    row = rows["needle", 1200]
    assert row["paired"]
    assert row["a"] == a["tasks"]["needle"]["lengths"]["1200"]["score"]
    assert row["b"] == b["tasks"]["needle"]["lengths"]["1200"]["score"] == 1.0
    gains = [1.0 - (s["score"]) for s in first.samples.values() if s["task"] == "needle"
             and s["length"] == 1200]  # fmt: skip
    assert row["difference"] == pytest.approx(np.mean(gains))
    plain = np.std(gains) / math.sqrt(10)
    assert plain < row["stderr"] < 1.2 * plain
    assert rows["noise", 600]["difference"] == 0
    # Ten equal answers are no proof that the models are equal.
    assert rows["noise", 600]["stderr"] == pytest.approx(1 / 11, abs=1e-6)
    assert not rows["noise", 600]["significant"]
    assert rows["all tasks", None]["n"] == 40


def test_pairs_have_the_smaller_error(runs: list[Path]) -> None:
    """The same rows, paired and not: what the samples have in common is gone from a pair."""
    first = read_runs(runs)[0]
    worse = {
        k: row | {"score": row["score"] * (row["index"] > 1)} for k, row in first.samples.items()
    }
    other = {k: row | {"prompt": "another"} for k, row in worse.items()}
    paired = compare(first, Run(runs[1], "b", first.results, worse, {}))
    apart = compare(first, Run(runs[1], "b", first.results, other, {}))
    assert {row["paired"] for row in paired} == {True}
    assert {row["paired"] for row in apart} == {False}
    for p, q in zip(paired, apart, strict=True):
        assert p["difference"] == q["difference"]
    total = [next(r for r in rows if r["task"] == "all tasks") for rows in (paired, apart)]
    assert total[0]["stderr"] < 0.7 * total[1]["stderr"]


def test_only_what_both_asked_is_paired(tmp_path: Path) -> None:
    ask(oracle(), tmp_path / "a", samples=6)
    ask(oracle(memory=700), tmp_path / "b", samples=9, tasks={"needle": NEEDLES["needle"]})
    rows = compare(*read_runs([tmp_path / "a", tmp_path / "b"]))
    assert [(r["task"], r["length"], r["n"]) for r in rows] == [
        ("needle", None, 12), ("needle", 600, 6), ("needle", 1200, 6),
    ]  # fmt: skip
    ask(oracle(), tmp_path / "c", samples=2, settings=Settings(seed=5),
        writer=SmallWriter(seed=5))  # fmt: skip
    found = compare(*read_runs([tmp_path / "a", tmp_path / "c"]))
    assert {row["paired"] for row in found} == {False}


def test_losses_of_the_same_windows(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("It was the best of times, it was the worst of times. " * 20)
    model, other = tiny_model(), tiny_model()
    other.head.weight.data *= 0.5
    found = {}
    for name, each in (("a", model), ("b", other)):
        writer = SmallWriter(model.tokenizer, book=book)
        more = {"tasks": {}, "loss": True, "lengths": (200,), "samples": 4, "writer": writer}
        found[name] = ask(OwnModel(each, name), tmp_path / name, **more)
    (row,) = compare(*read_runs([tmp_path / "a", tmp_path / "b"]))
    losses = [found[name]["loss_by_position"]["lengths"]["200"]["loss"] for name in "ab"]
    assert row["difference"] == pytest.approx(losses[1] - losses[0], abs=1e-5)
    assert row["n"] == 4
    assert row["stderr"] > 0


def test_the_command(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = CliRunner().invoke(compare_command, [*map(str, runs), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "model-2 minus model-1:" in done.output
    found = json.loads((out / "compare.json").read_text())
    assert [part["run"] for part in found["compared"]] == ["model-2", "model-3"]
    page, markdown = (out / "compare.html").read_text(), (out / "compare.md").read_text()
    for name in TASKS:
        assert page.count(f"<td>{name}</td>") == 14
        assert f"| {name} | 1,024 | 20 |" in markdown
    assert "http" not in page
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_refused(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="two finished runs"):
        read_runs(runs[:1])
    with pytest.raises(InputError, match="named twice"):
        read_runs([runs[0], runs[0]])
    with pytest.raises(InputError, match="holds no finished run"):
        read_runs([runs[0], tmp_path])
    (runs[1] / "samples.jsonl").write_text("rubbish\n")
    with pytest.raises(InputError, match="is damaged"):
        read_runs(runs[:2])
    alone = save(tmp_path / "alone", make_run(4, "m", tasks=("passkey",)))
    other = save(tmp_path / "other", make_run(4, "n", tasks=("ruler_vt",)))
    with pytest.raises(InputError, match="no task and length in common"):
        compare(*read_runs([alone, other]))
