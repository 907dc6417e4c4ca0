"""Several processes in one run folder: killed, resumed, together; the report is that of one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from needles import ask, oracle

from rwkvx.errors import InputError
from rwkvx_evals.long.rows import FIELDS
from rwkvx_evals.long.shards import Claims, SharedJournal
from rwkvx_evals.long.work import own_device

PARTS = ("tasks", "total", "sample_manifest", "answers", "prompt_tokens")

SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from needles import ask
from oracle import HistoryTools, Oracle
from rwkvx_evals.models.own import OwnModel

class Slow(Oracle):
    def next_token(self, text):
        time.sleep({pause})
        return super().next_token(text)

ask(OwnModel(Slow(memory=700), "oracle", tools=HistoryTools()), Path({out!r}), batch=2)
"""


def start(out: Path, pause: float, rank: int | None = None) -> subprocess.Popen[bytes]:
    script = SCRIPT.format(tests=str(Path(__file__).parent), out=str(out), pause=pause)
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    if rank is not None:
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    return subprocess.Popen([sys.executable, "-c", script], env=environment)


def wait(process: subprocess.Popen[bytes], until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not until():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def rows(out: Path) -> int:
    """Answers in all shards; every unit adds a row of its own."""
    lines = [s for p in (out / "journal").glob("*.jsonl") for s in p.read_bytes().splitlines()]
    return sum(b'"score"' in line for line in lines)


def shards(out: Path) -> int:
    return len(list((out / "journal").glob("*.jsonl")))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    ask(oracle(memory=700), out)
    return out


def check(out: Path, whole: Path) -> None:
    """The same report, but for times."""
    assert (out / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    found, wanted = (json.loads((p / "results.json").read_text()) for p in (out, whole))
    assert [found[part] for part in PARTS] == [wanted[part] for part in PARTS]


def test_killed_and_started_again(tmp_path: Path, whole: Path) -> None:
    process = start(tmp_path, 0.02)
    wait(process, lambda: rows(tmp_path) >= 3)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 3 <= rows(tmp_path) < 40
    assert not (tmp_path / "results.json").exists()
    assert start(tmp_path, 0.0).wait(120) == 0
    assert rows(tmp_path) == 40
    check(tmp_path, whole)


def test_two_processes_share_the_work_and_one_is_killed(tmp_path: Path, whole: Path) -> None:
    first, second = start(tmp_path, 0.03, 0), start(tmp_path, 0.03, 1)
    wait(first, lambda: shards(tmp_path) == 2 and rows(tmp_path) >= 4)
    second.send_signal(signal.SIGKILL)
    assert second.wait() == -signal.SIGKILL
    assert first.wait(180) == 0
    check(tmp_path, whole)


def test_two_processes_answer_nothing_twice(tmp_path: Path, whole: Path) -> None:
    both = [start(tmp_path, 0.02, rank) for rank in (0, 1)]
    assert [process.wait(180) for process in both] == [0, 0]
    assert shards(tmp_path) == 2
    assert rows(tmp_path) == 40
    check(tmp_path, whole)


SAMPLES = """
from rwkvx.errors import InputError
from rwkvx.tokenizers import get_tokenizer
from rwkvx_evals.long.tasks import TASKS
from rwkvx_evals.long.writer import Writer
writer = Writer(get_tokenizer("bytes"))
for name, task in TASKS.items():
    for length in (2000, 900):
        try:
            print(name, task.sample(writer, length, 3).sha256)
        except InputError:
            print(name, "needs data, or more tokens")
"""


def test_every_process_makes_the_same_samples() -> None:
    """Sets are in another order in every process: nothing may depend on it."""
    paths = os.pathsep.join(path for path in sys.path if path)
    common = {k: v for k, v in os.environ.items() if k != "RWKVX_DATA"} | {"PYTHONPATH": paths}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", SAMPLES],
            env=common | {"PYTHONHASHSEED": seed}, stdout=subprocess.PIPE, text=True,
        )
        for seed in ("1", "2")
    ]  # fmt: skip
    first, second = (process.communicate(timeout=120)[0] for process in both)
    assert first == second
    assert sum(len(line.split()) == 2 for line in first.splitlines()) > 20


HOLD = """
import sys, time
from pathlib import Path
from rwkvx_evals.long.rows import FIELDS
from rwkvx_evals.long.shards import Claims
claims = Claims(Path(sys.argv[1]))
with claims.take("ab" * 32) as ours:
    print(ours, flush=True)
    time.sleep(60)
"""


def test_a_claim_returns_when_its_process_dies(tmp_path: Path) -> None:
    paths = os.pathsep.join(path for path in sys.path if path)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "claims")],
        stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": paths},
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"True\n"
    claims = Claims(tmp_path / "claims")
    with claims.take("ab" * 32) as ours:
        assert not ours
    with claims.take("cd" * 32) as other:
        assert other
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with claims.take("ab" * 32) as ours:
        assert ours
    claims.close()


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("rwkvx_evals.long.shards.fcntl.lockf", refuse)
    with Claims(tmp_path / "claims").take("ab" * 32) as ours:
        assert ours
    with pytest.raises(InputError, match="has no locks: start one process only"):
        Claims(tmp_path / "claims", several=True)


def row(key: str, **more: Any) -> dict[str, Any]:
    found = {"key": key, "kind": "sample", "id": key, "task": "t", "length": 5, "index": 0,
             "prompt": "", "status": "ok", "score": 1.0, "answer": "", "expected": [], "about": {},
             "prompt_tokens": 1, "answer_tokens": 1, "tokens": [], "truncated": 0}  # fmt: skip
    return found | more


def test_shards_are_read_together(tmp_path: Path) -> None:
    with SharedJournal(tmp_path) as first, SharedJournal(tmp_path) as second:
        first.append([row("a", n=1), row("o", status="oom")])
        assert "a" not in second.rows
        second.refresh()
        assert second.rows["a"]["n"] == 1
        # Of this start: no second try.
        assert second.is_done("o")
        with SharedJournal(tmp_path) as later:
            assert later.is_done("a")
            assert not later.is_done("o")
            later.append([row("o", status="oom")])
            assert later.is_done("o")
            first.refresh()
            assert first.rows["o"]["attempt"] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0000.jsonl", "0002.jsonl"]


@pytest.mark.parametrize("tail", [b'{"key": "b", "n', b"\x00\x00\x00", b"\x00\x00\n"])
def test_a_shard_that_was_cut_short(tmp_path: Path, tail: bytes) -> None:
    (tmp_path / "0000.jsonl").write_text(json.dumps(row("a", attempt=1)) + "\n")
    with (tmp_path / "0000.jsonl").open("ab") as file:
        file.write(tail)
    with SharedJournal(tmp_path) as journal:
        assert list(journal.rows) == ["a"]


@pytest.mark.parametrize("name", ["kind", *FIELDS["sample"]])
def test_a_damaged_row_is_refused(tmp_path: Path, name: str) -> None:
    good = row("a", attempt=1)
    without = {key: value for key, value in good.items() if key != name}
    for bad in (without, good | {name: None}, good | {name: True}, [good], "rubbish"):
        (tmp_path / "0000.jsonl").write_text(f"{json.dumps(bad)}\n{json.dumps(good)}\n")
        with pytest.raises(InputError, match=r"0000.jsonl is damaged"):
            SharedJournal(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["0000.jsonl"]


def test_each_process_has_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_device("cuda") == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert own_device("cuda") == "cuda:3"
    assert own_device("cuda:1") == "cuda:1"
    assert own_device("cpu") == "cpu"


@pytest.mark.parametrize("name", ["belongs_to.json", "claims", "journal/0000.jsonl"])
def test_what_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    """A pipe in the place of a file of the run is neither waited for nor written to."""
    ask(oracle(), tmp_path, samples=1)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match="not a regular file"):
        ask(oracle(), tmp_path, samples=1)
