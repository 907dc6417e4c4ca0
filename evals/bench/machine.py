"""Where and with what a measurement was made."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import rwkvx
from rwkvx_evals.files import package_version

_VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def describe() -> dict[str, Any]:
    """Processor, memory, versions, threads, load, date and commit; None for what is not known."""
    cpu, flags = _processor()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "rwkvx": package_version(),
        "cpu": cpu,
        "cpu_flags": [flag for flag in _FLAGS if flag in flags],
        "cores": available_cores(),
        "memory_bytes": _memory(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load_average": load(),
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def warnings(machine: dict[str, Any]) -> list[str]:
    """What speaks against trusting a measurement, one sentence each."""
    found = []
    average = machine["load_average"]
    if average is not None and average > 0.5:
        found.append(
            f"the machine was not idle (load {average:.1f} over the minute before): "
            "times are too long and ratios less certain"
        )
    return found


def load() -> float | None:
    """Processes that ran or waited over the last minute, on average."""
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return None


def available_cores() -> int:
    """Logical cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def commit() -> str | None:
    """The commit of the checkout that is running, with "+" for changes; None when installed."""
    root = Path(rwkvx.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    name = _git(root, "rev-parse", "HEAD")
    return f"{name}+" if name and _git(root, "status", "--porcelain", "-uno") else name


def installed(package: str) -> str | None:
    """Version of a distribution, None where it is not installed.

    Importing proves less: several distributions install a folder `flash_attn`.
    """
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(root: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(root), *arguments]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def _processor() -> tuple[str, set[str]]:
    """Name and instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine(), set()
    fields: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    return fields.get("model name", platform.machine()), set(fields.get("flags", "").split())


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
