"""Bars and notices: on a terminal, and nowhere else."""

import io
import os
import subprocess
import sys

import pytest
from numba import njit

from rwkvx.progress import compilation_told, progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def work(file: io.StringIO, **options: bool) -> str:
    with progress(100, "prompt", file=file, **options) as bar:
        for _ in range(10):
            bar.update(10)
    return file.getvalue()


def test_bars_are_for_terminals() -> None:
    assert "prompt: 100%" in work(Terminal())
    assert work(io.StringIO()) == ""
    assert work(Terminal(), quiet=True) == ""


def test_what_is_written_beside_a_bar_reaches_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    with progress(100, file=stream) as bar:
        bar.write("step 3: loss 0.5", file=stream)
    assert stream.getvalue() == "step 3: loss 0.5\n"


def test_compiling_is_told_once() -> None:
    first, second, log = Terminal(), Terminal(), io.StringIO()

    def compiled(x: int) -> int:
        return x + 1

    with compilation_told(first):
        njit(compiled)(1)
        njit(compiled)(2)
    njit(compiled)(3)  # no longer watched
    assert first.getvalue() == "compiling for this processor: about a minute, once ...\n"
    with compilation_told(second):
        pass
    with compilation_told(log):
        njit(compiled)(1)
    assert second.getvalue() == log.getvalue() == ""


def test_numba_is_not_imported_to_watch_it() -> None:
    """But it is watched when something imports it."""
    code = """
import io, sys, time
from rwkvx.progress import compilation_told
Terminal = type("Terminal", (io.StringIO,), {"isatty": lambda self: True})
stream = Terminal()
with compilation_told(stream):
    assert "numba" not in sys.modules
    from numba import njit
    time.sleep(1)
    njit(lambda x: x + 1)(1)
assert "compiling" in stream.getvalue()
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
