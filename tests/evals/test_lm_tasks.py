"""Whole runs of lm-eval's tasks, how tasks are found, and what is said when there is no data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model

from rwkvx.data.folder import data_folder
from rwkvx.errors import InputError
from rwkvx_evals.folder import MARK

pytest.importorskip("lm_eval")

from lm_eval.loggers import evaluation_tracker
from lm_eval.tasks import TaskManager

from rwkvx_evals.lm.evaluate import evaluate
from rwkvx_evals.lm.harness import quiet_lm_eval
from rwkvx_evals.lm.settings import Settings
from rwkvx_evals.lm.tasks import definition_file, load_tasks

REPORTS = ("report.md", "scores.png")
TASKS = ("lambada_openai", "piqa")


@pytest.fixture(autouse=True)
def short_description(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval describes the machine with `pip list`, which takes longer than a test."""
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "")


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


def run(out: Path, folder: Path | None, model: Any = None, **more: Any) -> dict[str, Any]:
    own = {k: more.pop(k) for k in ("log_samples", "batch") if k in more}
    settings = Settings(more.pop("tasks", TASKS), **more)
    return evaluate(model or tiny_model(), "tiny", settings, out, folder=folder, quiet=True, **own)


def numbers(path: Path) -> dict[str, Any]:
    """results.json without what differs from run to run."""
    found = json.loads((path / "results.json").read_text())
    assert set(found.pop("run")) == {"date", "command", "commit", "versions", "machine"}
    return dict(found)


def test_a_whole_run(tmp_path: Path, folder: Path) -> None:
    results = run(tmp_path / "out", folder)
    table = {(row["task"], row["metric"]): row for row in results["table"]}
    assert set(table) == {
        ("lambada_openai", "perplexity"), ("lambada_openai", "acc"),
        ("piqa", "acc"), ("piqa", "acc_norm"),
    }  # fmt: skip
    assert table["piqa", "acc"]["n"] == 4
    assert table["piqa", "acc"]["chance"] == 0.5
    assert results["requests"]["piqa"] == {
        "asked": 8, "scored": 8, "failed": 0, "oom": 0, "invalid": 0,
    }  # fmt: skip
    assert results["data"]["piqa"].startswith(f"folder {folder} (piqa/valid.jsonl")
    text = (tmp_path / "out" / "report.md").read_text()
    assert f"Data of piqa: folder {folder}" in text
    assert (tmp_path / "out" / "scores.png").read_bytes().startswith(b"\x89PNG")
    assert numbers(tmp_path / "out") == results


def test_all_or_none_right_is_not_certain(tmp_path: Path, folder: Path) -> None:
    """No last word of LAMBADA is greedy for random weights: 0 of 5, with Wilson's interval."""
    results = run(tmp_path / "out", folder)
    row = next(r for r in results["table"] if r["task"] == TASKS[0] and r["metric"] == "acc")
    assert (row["value"], row["stderr"]) == (0.0, None)
    assert row["interval"] == [0.0, pytest.approx(0.434, abs=1e-3)]
    assert (
        "| acc | 0.0000 | 0.0000 to 0.4345 (95 %) | 5 |"
        in (tmp_path / "out" / "report.md").read_text()
    )


def test_resuming_gives_the_same_numbers(tmp_path: Path, folder: Path) -> None:
    run(tmp_path / "whole", folder)
    lines = (tmp_path / "whole" / "requests.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / MARK).write_bytes((tmp_path / "whole" / MARK).read_bytes())
    (tmp_path / "cut" / "requests.jsonl").write_bytes(b"".join(lines[:5]) + lines[5][:30])
    run(tmp_path / "cut", folder)
    for name in REPORTS:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")


def test_results_of_others_are_not_overwritten(tmp_path: Path, folder: Path) -> None:
    out = tmp_path / "out"
    run(out, folder, limit=2)
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    with pytest.raises(InputError, match=r"other settings \(limit: 2, not 3\)"):
        run(out, folder, limit=3)
    other = tiny_model()
    with torch.no_grad():
        other.head.weight += 1
    with pytest.raises(InputError, match="holds results of other weights"):
        run(out, folder, other, limit=2)
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == before
    passkey = tmp_path / "passkey"
    passkey.mkdir()
    (passkey / "results.json").write_text('{"task": "passkey"}')
    with pytest.raises(InputError, match=r"holds other files \(results.json"):
        run(passkey, folder)
    assert (passkey / "results.json").read_text() == '{"task": "passkey"}'


def test_a_task_with_invalid_requests_has_no_score(tmp_path: Path, folder: Path) -> None:
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
    # lm-eval's own format has no place for a task without a score: it would hold a wrong one.
    assert not (tmp_path / "out" / "tiny").exists()


def test_a_limit_is_said(tmp_path: Path, folder: Path) -> None:
    results = run(tmp_path / "out", folder, limit=2)
    assert {row["n"] for row in results["table"]} == {2}
    assert "Only the first 2 items" in (tmp_path / "out" / "report.md").read_text()
    results = run(tmp_path / "share", folder, limit=0.5)
    assert {(r["task"], r["n"]) for r in results["table"]} == {(TASKS[0], 3), ("piqa", 2)}
    assert "Only the first 50 % of the items" in (tmp_path / "share" / "report.md").read_text()


def test_lm_evals_own_files(tmp_path: Path, folder: Path) -> None:
    results = run(
        tmp_path / "out", folder, log_samples=True, num_fewshot=2, samples={"piqa": [3, 1]},
        tasks=("piqa",),
    )  # fmt: skip
    own = tmp_path / "out" / "tiny"
    (aggregated,) = own.glob("results_*.json")
    found = json.loads(aggregated.read_text())
    assert found["config"]["model"] == "rwkvx"
    assert found["n-shot"] == {"piqa": 2}
    assert found["results"]["piqa"]["acc,none"] == results["table"][0]["value"]
    assert found["task_hashes"]["piqa"]
    (samples,) = own.glob("samples_piqa_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(rows) == 2
    context, answer = rows[0]["arguments"]["gen_args_0"].values()
    assert context.count("Question: ") == 3
    assert answer == " Like this."
    assert (
        "Few-shot examples of piqa are other evaluated items"
        in (tmp_path / "out" / "report.md").read_text()
    )


def test_lm_evals_own_files_are_whole_or_it_is_said(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-eval swallows its own failures to write."""

    def full(*args: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lm_eval.loggers.evaluation_tracker.asdict", full)
    with pytest.raises(InputError, match="lm-eval could not write its files"):
        run(tmp_path / "out", folder)
    assert (tmp_path / "out" / "report.md").exists()


def test_samples_that_are_cut_short_are_seen(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fills while lm-eval writes its samples."""
    original, rows = evaluation_tracker.sanitize_list, iter(range(7))

    def stops(value: Any) -> Any:
        if next(rows, None) is None:
            raise OSError(28, "No space left on device")
        return original(value)

    monkeypatch.setattr(evaluation_tracker, "sanitize_list", stops)
    with pytest.raises(InputError, match="is the disk full"):
        run(tmp_path / "out", folder, log_samples=True)


GENERATE = """
task: echo
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with definitions of one's own: a generating task, and a group around it."""
    root = tmp_path / "own"
    root.mkdir()
    (root / "items.jsonl").write_text('{"text": "ab", "answer": "x"}\n' * 3)
    (root / "echo.yaml").write_text(GENERATE.format(file=root / "items.jsonl"))
    return root


def test_tasks_of_ones_own(tmp_path: Path, own: Path) -> None:
    results = run(tmp_path / "a", None, tasks=("echo",), include=(str(own),))
    assert results["data"]["echo"] == "files of its own (json)"
    assert results["decoding"] == {"echo": ["greedy"]}
    (row,) = results["table"]
    assert (row["metric"], row["n"], row["value"]) == ("exact_match", 3, 0.0)
    drawn = run(
        tmp_path / "b", None, tasks=(str(own / "echo.yaml"),),
        gen_kwargs={"do_sample": True, "temperature": 0.9},
    )  # fmt: skip
    assert drawn["decoding"] == {"echo": ["sampled at temperature 0.9"]}
    assert "echo: sampled at temperature 0.9" in (tmp_path / "b" / "report.md").read_text()
    only = run(tmp_path / "c", None, tasks=(str(own),), predict_only=True)
    assert [row["metric"] for row in only["table"]] == ["bypass"]
    (own / "items.jsonl").unlink()
    with pytest.raises(InputError, match="task echo cannot read its data files: "):
        run(tmp_path / "d", None, tasks=("echo",), include=(str(own),))
    with pytest.raises(InputError, match="is not a folder"):
        run(tmp_path / "d", None, tasks=("echo",), include=(str(own / "none"),))


@pytest.fixture
def small_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups, and names that are not there, need lm-eval's whole index: it takes 13 s."""
    monkeypatch.setattr(TaskManager.__init__, "__defaults__", (None, None, False, None))


def test_groups_count_and_fail_with_their_tasks(
    tmp_path: Path, folder: Path, small_index: None
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    for name in TASKS:
        found = definition_file(name)
        assert found is not None
        (own / f"{name}.yaml").write_text(found.read_text())
    (own / "both.yaml").write_text(
        "group: both\ntask: [lambada_openai, piqa]\n"
        "aggregate_metric_list:\n  - {metric: acc, weight_by_size: true}\n"
    )
    results = run(tmp_path / "out", folder, tasks=("both",), include=(str(own),))
    rows = {(row["task"], row["metric"]): row for row in results["table"]}
    group = rows["both", "acc"]
    assert group["group"]
    assert group["n"] == 9
    right = 5 * rows[TASKS[0], "acc"]["value"] + 4 * rows["piqa", "acc"]["value"]
    assert group["value"] == pytest.approx(right / 9)
    model = tiny_model()
    with torch.no_grad():
        model.emb.weight[ord("?")] = float("nan")
    results = run(tmp_path / "nan", folder, model, tasks=("both",), include=(str(own),))
    values = {row["task"]: row["value"] for row in results["table"] if row["metric"] == "acc"}
    assert values["both"] is values["piqa"] is None
    with pytest.raises(InputError, match="Duplicate task 'piqa'"):
        run(tmp_path / "twice", folder, tasks=("both", "piqa"), include=(str(own),))
    with pytest.raises(InputError, match="no task 'no_such': rwkvx lm-eval ls"):
        run(tmp_path / "none", folder, tasks=("no_such",))
    with pytest.raises(InputError, match=r"no task 'piqua', did you mean piqa\?"):
        run(tmp_path / "typo", folder, tasks=("piqua",), include=(str(own),))
    assert set(run(tmp_path / "star", folder, tasks=("pi*", "lam*"), include=(str(own),))["data"])


def test_what_lm_eval_refuses_is_one_line(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(InputError, match=r"lm-eval refuses: .*Sample larger than population"):
        run(tmp_path / "out", folder, tasks=("piqa",), num_fewshot=40)
    with pytest.raises(InputError, match=r"lm-eval refuses: AssertionError: Elements of --samples"):
        run(tmp_path / "b", folder, tasks=("piqa",), samples={"piqa": [99]})


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
    (folder / "piqa" / "valid.jsonl").unlink()
    long = folder.rename(folder.with_name("d" * 200))
    with pytest.raises(InputError, match=r"; …d+ does not hold it") as caught:
        load_tasks(["piqa"], long)
    assert len(str(caught.value)) <= 300


def test_the_true_cause_is_named(tmp_path: Path) -> None:
    """Tasks that make their data: a missing package or tokenizer is no matter of the hub."""
    (tmp_path / "makers.py").write_text(
        "def makes(**kwargs):\n    assert 'tokenizer' in kwargs, 'No tokenizer:\\n name one'\n"
    )
    (tmp_path / "needs.py").write_text("import no_such_package\ndef makes(**_): pass\n")
    for name in ("makers", "needs"):
        text = f"task: {name}\ncustom_dataset: !function {name}.makes\ntest_split: test\n"
        (tmp_path / f"{name}.yaml").write_text(text)
    with quiet_lm_eval():
        with pytest.raises(InputError, match=r"make its data: No tokenizer: .what it needs"):
            load_tasks(["makers"], None, [tmp_path])
        with pytest.raises(InputError, match="task needs needs the package no_such_package"):
            load_tasks(["needs"], None, [tmp_path])
        (tmp_path / "needs.yaml").write_text("task: needs\noutput_type: nonsense\n")
        with pytest.raises(InputError, match="task needs cannot be loaded: Got invalid output"):
            load_tasks(["needs"], None, [tmp_path])


def test_a_definition_that_cannot_be_read(tmp_path: Path, small_index: None) -> None:
    """lm-eval leaves it out without a word."""
    (tmp_path / "mine.yaml").write_text("task: mine\n  output: [\n")
    with (
        quiet_lm_eval(),
        pytest.raises(InputError, match=r"no task 'mine'.*; mine.yaml cannot be read"),
    ):
        load_tasks(["mine"], None, [tmp_path])


def test_labels_out_of_range_are_said(tmp_path: Path, folder: Path) -> None:
    """lm-eval counts such an item as wrong, and only warns."""
    (folder / "piqa" / "valid-labels.lst").write_text("0\n7\n7\n0\n")
    results = run(tmp_path / "out", folder, tasks=("piqa",))
    (warning,) = results["warnings"]
    assert results["warnings"][warning] == 2
    assert "lm-eval warns (2 ×): Label index was not" in (tmp_path / "out/report.md").read_text()


def test_definitions_are_found_by_name() -> None:
    for name, stem in (("piqa", "piqa"), ("boolq", "default"), ("mmlu_anatomy", "mmlu_anatomy")):
        found = definition_file(name)
        assert found is not None
        assert found.stem == stem
    assert definition_file("no_such_task_at_all") is None


def test_the_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RWKVX_DATA", raising=False)
    assert data_folder(None) is None
    monkeypatch.setenv("RWKVX_DATA", str(tmp_path))
    assert data_folder(None) == tmp_path
    with pytest.raises(InputError, match=r"\(from --data\) is not a folder"):
        data_folder(str(tmp_path / "none"))
