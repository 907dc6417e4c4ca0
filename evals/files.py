"""Writing result files whole or not at all, and what identifies the code that made them."""

from __future__ import annotations

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
from rwkvx.files import replacing, write_json, write_text

__all__ = [
    "code_fingerprint", "digest", "machine", "package_version", "peak_memory_bytes",
    "write_atomically", "write_json", "write_text",
]  # fmt: skip


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a temporary neighbour of `path`, then renames it into place.

    Raises WriteError, leaving the old file as it was, when the disk refuses (full, read-only).
    """
    with replacing(path) as temporary:
        write(temporary)


def short(path: Path | str, size: int = 100) -> str:
    """A path for a message of one line: its end, where it is longer."""
    text = str(path)
    return text if len(text) <= size else f"…{text[1 - size :]}"


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
