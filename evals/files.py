"""Writing result files whole or not at all, and what identifies the code that made them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import resource
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import rwkvx
import rwkvx_kernels
from rwkvx.errors import InputError


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a temporary neighbour of `path`, then renames it into place.

    Raises InputError, leaving the old file as it was, when the disk refuses (full, read-only).
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file atomically."""
    write_atomically(path, lambda temporary: _write_utf8(temporary, text))


def _write_utf8(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically, with keys in the order given."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def digest(value: Any) -> str:
    """SHA-256 (hex) of a JSON value, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


# What does not change a model's answers: commands, training, reports and pictures.
_NOT_ANSWERS = {"cli", "training", "bench", "report", "compare"}
_NOT_ANSWERS |= {"command.py", "report.py", "heatmap.py", "chart.py"}


@cache
def code_fingerprint() -> str:
    """SHA-256 (hex) over the version and the sources that decide what a model answers."""
    sha = hashlib.sha256(package_version().encode())
    roots = [Path(root) for package in (rwkvx, rwkvx_kernels) for root in package.__path__]
    for root in (*roots, Path(__file__).parent):
        for file in sorted(root.rglob("*.py")):
            relative = file.relative_to(root)
            if not _NOT_ANSWERS.intersection(relative.parts):
                sha.update(f"\n{relative.as_posix()}\n".encode())
                sha.update(file.read_bytes())
    return sha.hexdigest()


def package_version() -> str:
    """The version of the package whose code is running."""
    return rwkvx.__version__


def peak_memory_bytes() -> int:
    """The largest resident set size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def machine() -> str:
    """The machine in words, for timing files."""
    return f"{platform.machine()}, {os.cpu_count()} logical CPUs, {platform.system()}"
