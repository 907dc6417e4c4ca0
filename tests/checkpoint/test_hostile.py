"""Files that ask for more than they hold: one line each, within a gigabyte and ten seconds."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rwkvx import load
from rwkvx.cli.info import describe
from rwkvx.errors import InputError

GIGABYTE, SECONDS = 10**9, 10
HARMLESS = {
    "device as SHA256SUMS",
    "loop as SHA256SUMS",
    "pipe as SHA256SUMS",
    "folder as SHA256SUMS",
    "sums",
}


def attempt(name: str, folder: Path) -> tuple[list[str], float]:
    """What loading, describing and verifying say, "" for each that works; most seconds of one.

    Of the processor, which others do not make longer; what waits for ever ends with the process.
    """
    from hostile import HOSTILE

    folder.mkdir()
    path, said, longest = HOSTILE[name](folder), [], 0.0
    for read in (load, describe, lambda path: load(path, verify=True)):
        began = time.process_time()
        try:
            read(path)
            said.append("")
        except InputError as error:
            said.append(str(error))
        longest = max(longest, time.process_time() - began)
    return said, longest


def main(folder: Path) -> None:
    """Every case in one process: what was said, seconds, and the peak of memory so far."""
    from hostile import HOSTILE

    load("passkey-tiny")  # what loading takes at all
    for number, name in enumerate(HOSTILE):
        said, seconds = attempt(name, folder / str(number))
        # Not `ru_maxrss`: it begins with the peak of the process that started this one.
        peak = 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
        print(json.dumps([name, said, seconds, peak]), flush=True)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, __file__, str(tmp_path_factory.mktemp("hostile"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, (rows[-1:], done.stderr[-2000:])
    return {name: rest for name, *rest in rows}


def test_each_is_one_line(results: dict[str, list]) -> None:
    for name, (said, _, _) in results.items():
        for line in said[2:] if name in HARMLESS else said:
            assert line, f"{name} was read"
            assert len(line) <= 300, name
            assert "\n" not in line, name


def test_none_takes_long(results: dict[str, list]) -> None:
    slow = {name: seconds for name, (_, seconds, _) in results.items() if seconds > SECONDS}
    assert not slow


def test_none_takes_much_memory(results: dict[str, list]) -> None:
    """The process as a whole, torch included."""
    assert max(peak for _, _, peak in results.values()) < GIGABYTE, results


if __name__ == "__main__":
    main(Path(sys.argv[1]))
