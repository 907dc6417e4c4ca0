"""Where, when and with what a run was made."""

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import rwkvx

__all__ = ["command_line", "facts"]


def facts() -> dict[str, Any]:
    """Date, command, machine, versions and commit; None for what is not known."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "machine": _machine(),
        "rwkvx": rwkvx.__version__,
        "torch": torch.__version__,
        "commit": _commit(),
    }


def command_line() -> str:
    """What was typed to start this process, without folders of the program."""
    program = Path(sys.argv[0]).name
    return shlex.join(["rwkvx" if program == "__main__.py" else program, *sys.argv[1:]])


def _machine() -> str:
    """Processor, cores that may be used, and GPUs."""
    found = [f"{_processor()}, {len(os.sched_getaffinity(0))} cores"]
    if torch.cuda.is_available():
        found += [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return "; ".join(found)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _commit() -> str | None:
    """The commit of the checkout that runs, with "+" for changes; None for an installed package."""
    root = Path(rwkvx.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    name = _git(root, "rev-parse", "HEAD")
    return f"{name}+" if name and _git(root, "status", "--porcelain", "-uno") else name


def _git(root: Path, *arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(root), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
