"""The passkey run against oracles: right answers, sharing, failures, resuming."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from oracle import HistoryTools, Oracle

from rwkvx.errors import InputError
from rwkvx_evals.lengths import parse_length, parse_lengths
from rwkvx_evals.passkey.evaluate import evaluate
from rwkvx_evals.passkey.plan import Settings, depth_values, read_answer

SETTINGS = Settings((512, 1024, 2048), depth_values(5), 3, 12, "float32")
REPORTS = ("report.md", "results.json", "heatmap.png")


def ask(model: Oracle, out: Path, settings: Settings = SETTINGS, **more: Any) -> dict[str, Any]:
    return evaluate(model, "oracle", settings, out, tools=HistoryTools(), quiet=True, **more)


def test_an_oracle_is_always_right(tmp_path: Path) -> None:
    results = ask(Oracle(), tmp_path)
    assert results["total"]["correct"] == results["total"]["asked"] == 45
    assert results["effective_length"] == 2048
    assert "Every sample was answered rightly" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "heatmap.png").read_bytes().startswith(b"\x89PNG")


def test_a_forgetful_oracle_scores_by_depth(tmp_path: Path) -> None:
    results = ask(Oracle(memory=700), tmp_path)
    share = {(cell["length"], cell["depth"]): cell["accuracy"] for cell in results["cells"]}
    for (length, depth), value in share.items():
        # The distance from the needle to the question, in bytes of this tokenizer.
        distance = (1 - depth) * (length - 247) + 61
        assert value == (1.0 if distance < 700 else 0.0), (length, depth)
    assert results["effective_length"] == 512


def test_the_prefix_is_read_once(tmp_path: Path) -> None:
    model = Oracle()
    settings = Settings((4096,), depth_values(10), 5, 1, "float32")
    results = ask(model, tmp_path, settings)
    tokens = results["prompt_tokens"]
    assert tokens["without_sharing"] == 50 * 4096
    assert model.tokens_read == tokens["read"]
    assert tokens["read"] < 0.55 * tokens["without_sharing"]


@pytest.mark.parametrize("batch", [1, 2])
def test_batches_do_not_change_the_report(tmp_path: Path, batch: int) -> None:
    ask(Oracle(memory=700), tmp_path / "a")
    ask(Oracle(memory=700), tmp_path / "b", batch=batch)
    for name in REPORTS:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_batch_that_does_not_fit_is_halved(tmp_path: Path) -> None:
    model = Oracle(batch_limit=1)
    assert ask(model, tmp_path)["total"]["correct"] == 45
    assert max(model.rows_seen) > 1


def test_no_memory_for_one_sample_is_recorded_and_tried_again(tmp_path: Path) -> None:
    results = ask(Oracle(oom_at=1500), tmp_path)
    assert results["total"] | {"stderr": 0, "interval": 0} == {
        "asked": 45, "scored": 30, "failed": 15, "oom": 15, "invalid": 0, "correct": 30,
        "accuracy": 0.666667, "stderr": 0, "interval": 0,
    }  # fmt: skip
    assert results["effective_length"] == 1024
    assert ask(Oracle(), tmp_path)["total"]["correct"] == 45


def test_not_a_number_is_invalid_and_not_wrong(tmp_path: Path) -> None:
    results = ask(Oracle(nan_at=1024), tmp_path)
    assert results["total"]["invalid"] == 30
    assert results["total"]["scored"] == 15
    assert "| 1,024 | 15 | 0 | 15 |" in (tmp_path / "report.md").read_text()


def test_a_journal_without_what_is_read_is_refused(tmp_path: Path) -> None:
    ask(Oracle(), tmp_path)
    path = tmp_path / "journal" / "0000.jsonl"
    whole = [json.loads(line) for line in path.read_text().splitlines()]
    assert whole[3]["kind"] == "sample"
    for name in ("key", "length", "status", "score", "answer", "expected", "about", "tokens"):
        for change in ({}, {name: 7.5 if name != "score" else 2}, {name: None}):
            damaged = {k: v for k, v in whole[3].items() if k != name} | change
            rows = [*whole[:3], damaged, *whole[4:]]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            with pytest.raises(InputError, match="is no row of a run"):
                ask(Oracle(), tmp_path)


def test_a_journal_answers_only_for_the_same_model_and_settings(tmp_path: Path) -> None:
    ask(Oracle(), tmp_path)
    again = Oracle()
    ask(again, tmp_path)
    assert again.tokens_read == 0
    other = Oracle(memory=700)
    assert ask(other, tmp_path)["total"]["correct"] < 45
    fewer = Oracle()
    ask(fewer, tmp_path, Settings((512,), depth_values(5), 3, 11, "float32"))
    assert fewer.tokens_read > 0


@pytest.mark.parametrize("keep", [0, 7, 20])
def test_resuming_from_a_cut_journal(tmp_path: Path, keep: int) -> None:
    ask(Oracle(memory=700), tmp_path / "whole")
    shard = Path("journal") / "0000.jsonl"
    lines = (tmp_path / "whole" / shard).read_bytes().splitlines(keepends=True)
    (tmp_path / "cut" / "journal").mkdir(parents=True)
    (tmp_path / "cut" / shard).write_bytes(b"".join(lines[:keep]) + lines[keep][:25])
    model = Oracle(memory=700)
    ask(model, tmp_path / "cut")
    for name in (*REPORTS, "samples.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


SLOW = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from oracle import HistoryTools, Oracle
from rwkvx_evals.passkey.evaluate import evaluate
from rwkvx_evals.passkey.plan import Settings, depth_values

class Slow(Oracle):
    def next_token(self, text):
        time.sleep({pause})
        return super().next_token(text)

settings = Settings((512, 1024, 2048), depth_values(5), 3, 12, "float32")
evaluate(Slow(memory=700), "oracle", settings, Path({out!r}), tools=HistoryTools(), quiet=True)
"""


def run_slowly(out: Path, pause: float) -> subprocess.Popen[bytes]:
    tests = str(Path(__file__).parent)
    script = SLOW.format(tests=tests, out=str(out), pause=pause)
    paths = [path for path in sys.path if path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", script], env=environment)


def test_killed_and_started_again(tmp_path: Path) -> None:
    out = tmp_path / "killed"
    process = run_slowly(out, 0.02)
    journal = out / "journal" / "0000.jsonl"
    deadline = time.monotonic() + 60
    while not journal.exists() or journal.read_bytes().count(b"\n") < 4:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / "report.md").exists()
    done = journal.read_bytes().count(b"\n")
    assert 4 <= done < 45
    assert run_slowly(out, 0.0).wait() == 0
    ask(Oracle(memory=700), tmp_path / "whole")
    for name in REPORTS:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_prose_that_is_shorter_than_a_prompt_is_said(tmp_path: Path) -> None:
    prose = tmp_path / "prose.txt"
    prose.write_text("It was a bright cold day in April. " * 20)
    results = ask(Oracle(), tmp_path / "out", haystack=prose)
    assert results["total"]["correct"] == 45
    assert "701 tokens; longer prompts repeat it" in (tmp_path / "out" / "report.md").read_text()


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least 247"):
        ask(Oracle(), tmp_path, Settings((246,), (0.5,), 1, 12, "float32"))
    for text in ("", "4x", "-1", "0", "1.5k"):
        with pytest.raises(InputError, match="is not a positive number"):
            parse_length(text)
    with pytest.raises(InputError, match="must be a whole number"):
        depth_values(0)
    with pytest.raises(InputError, match="batch must be"):
        ask(Oracle(), tmp_path, batch=0)
    assert not (tmp_path / "report.md").exists()


def test_lengths_are_read_as_powers_of_two() -> None:
    assert parse_lengths("1m, 4K,1k,1000,1024") == (1000, 1024, 4096, 1_048_576)


def test_the_first_number_counts() -> None:
    assert read_answer(" 123.") == "123"
    assert read_answer(" 1234") == "1234"
    assert read_answer(" no") is None


def test_rows_are_readable_json(tmp_path: Path) -> None:
    ask(Oracle(), tmp_path)
    first = json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[0])
    assert first["answer"] == f" {first['passkey']}."
    assert first["status"] == "ok"
