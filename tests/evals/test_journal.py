"""The journal on bad days: cut lines, a second run, a full disk."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rwkvx.errors import InputError
from rwkvx_evals.files import write_text
from rwkvx_evals.journal import Journal, Row


def test_rows_survive(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.jsonl"
    with Journal(path) as journal:
        journal.append([{"key": "a", "text": "é\ud800"}, {"key": "b", "n": 1}])
        journal.append([{"key": "b", "n": 2}])
    with Journal(path) as journal:
        assert journal.rows["b"]["n"] == 2
        assert journal.rows["a"]["text"] == "é\ud800"
        assert "c" not in journal


@pytest.mark.parametrize("tail", [b'{"key": "b", "n', b'{"key"', b"\x00\x00\x00", b"\x00\x00\n"])
def test_an_unfinished_last_line_is_dropped(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"key":"a"}\n' + tail)
    with Journal(path) as journal:
        assert list(journal.rows) == ["a"]
        journal.append([{"key": "c"}])
    assert path.read_bytes() == b'{"key":"a"}\n{"key":"c"}\n'


def test_a_damaged_line_in_the_middle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"key":"a"}\nrubbish\n{"key":"b"}\n')
    with pytest.raises(InputError, match="line 2 is damaged"):
        Journal(path)


def test_rows_without_what_is_read_are_refused(tmp_path: Path) -> None:
    """Also as the last line: no crash leaves a whole row with other fields."""
    path = tmp_path / "rows.jsonl"

    def check(row: Row) -> None:
        if "status" not in row:
            raise ValueError("it has no status")

    path.write_bytes(b'{"key":"a","status":"ok"}\n{"key":"b"}\n')
    with pytest.raises(InputError, match="line 2 is damaged: it has no status; move the file away"):
        Journal(path, check)
    for row in (b"3", b"[]", b'"key"', b'{"key": 3}', b'{"key": ["a"]}', b"{}", b"null"):
        path.write_bytes(b'{"key":"a"}\n' + row + b"\n")
        with pytest.raises(InputError, match="line 2 is damaged: it has no key"):
            Journal(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    """Reading a pipe would wait forever."""

    def waited(*_: object) -> None:
        raise TimeoutError("a pipe was read")

    os.mkfifo(tmp_path / "pipe")
    before = signal.signal(signal.SIGALRM, waited)
    signal.alarm(20)
    try:
        with pytest.raises(InputError, match="not a regular file"):
            Journal(tmp_path / "pipe")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(InputError, match="cannot open"):
        Journal(tmp_path)


def test_two_runs_do_not_share_a_journal(tmp_path: Path) -> None:
    with Journal(tmp_path / "rows.jsonl"), pytest.raises(InputError, match="another run"):
        Journal(tmp_path / "rows.jsonl")


FULL = """
import resource, sys
from pathlib import Path
from rwkvx.errors import InputError
from rwkvx_evals.files import write_text
from rwkvx_evals.journal import Journal
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
folder = Path(sys.argv[1])
try:
    with Journal(folder / "rows.jsonl") as journal:
        for n in range(100):
            journal.append([{"key": str(n), "text": "x" * 20}])
except InputError as error:
    print(error)
try:
    write_text(folder / "report.md", "y" * 1000)
except InputError as error:
    print(error)
"""


def test_a_full_disk_leaves_whole_rows_and_one_line(tmp_path: Path) -> None:
    (tmp_path / "report.md").write_text("old")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    journal_line, report_line = done.stdout.splitlines()
    assert "the 2 finished rows are kept" in journal_line
    assert "cannot write" in report_line
    assert (tmp_path / "rows.jsonl").read_text().count("\n") == 2
    assert (tmp_path / "rows.jsonl").read_text().endswith("}\n")
    assert (tmp_path / "report.md").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.md", "rows.jsonl"]


def test_no_space_left_on_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    answers = iter([5])

    def write(file: int, data: memoryview) -> int:
        if (count := next(answers, None)) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, data[:count])

    with Journal(tmp_path / "rows.jsonl") as journal:
        journal.append([{"key": "a"}])
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", write)
            with pytest.raises(InputError, match="No space left on device"):
                journal.append([{"key": "b"}])
        assert list(journal.rows) == ["a"]
        assert (tmp_path / "rows.jsonl").read_bytes() == b'{"key":"a"}\n'
        journal.append([{"key": "c"}])
    assert (tmp_path / "rows.jsonl").read_bytes() == b'{"key":"a"}\n{"key":"c"}\n'


def test_files_are_whole_or_not_there(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(InputError, match="cannot write"):
        write_text(blocked / "report.md", "text")
