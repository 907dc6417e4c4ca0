"""A whole kernel benchmark: ceilings of the machine, correctness, timings, the files."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from rwkvx.errors import InputError
from rwkvx_evals.bench.kernels import wkv7
from rwkvx_evals.bench.kernels.case import Call, Case
from rwkvx_evals.bench.kernels.report import draw, render
from rwkvx_evals.bench.machine import describe
from rwkvx_evals.files import write_atomically, write_json, write_text

# Modules with a function `cases(device, lengths)`.
FAMILIES = {"wkv7": wkv7}
LENGTHS = (4096, 16384, 65536)
SECONDS = 0.5  # spent on timing one subject of one case
REPEATS = (5, 50)  # at least and at most


def run(
    families: Sequence[str],
    lengths: tuple[int, ...],
    out: Path,
    device: str = "cuda",
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measures, and writes results.json (after every case), kernels.png and report.md into `out`.

    Raises InputError where there is no GPU, and for a kernel that computes something wrong.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("rwkvx bench kernels measures kernels on a GPU, and torch sees none here")
    results: dict[str, Any] = {
        "benchmark": "kernels",
        "complete": False,
        "machine": describe() | _gpu(device),
        "ceilings": ceilings(device),
        "cases": [],
    }
    write_json(out / "results.json", results)  # a folder that cannot be written is said at once
    for name, value in results["ceilings"].items():
        say(f"ceiling: {name} {value:.4g}")
    for family in families:
        for case in FAMILIES[family].cases(device, lengths):
            row = measure(case, results["ceilings"], device)
            results["cases"].append(row)
            write_json(out / "results.json", results)
            say(line(row))
    results["complete"] = True
    write_json(out / "results.json", results)
    write_atomically(out / "kernels.png", lambda path: draw(results, path))
    write_text(out / "report.md", render(results))
    return results


def measure(case: Case, ceilings: dict[str, float], device: str) -> dict[str, Any]:
    """Errors first, then seconds of every subject; the floor is that of bytes."""
    errors = case.errors()
    if not errors["ours"] <= case.tolerance:
        raise InputError(
            f"{case.family} computes something wrong on this machine: relative error "
            f"{errors['ours']:.1e}, at most {case.tolerance:.1e} was expected; nothing was timed"
        )
    subjects = case.subjects()
    seconds = {name: seconds_of(call, device) for name, call in subjects.items()}
    floor = case.bytes / (1e9 * ceilings["copy, GB/s"])
    return {
        "family": case.family,
        "tokens": case.tokens,
        "bytes": case.bytes,
        "flops": case.flops,
        "errors": errors,
        "seconds": seconds,
        "floor_seconds": floor,
        "times_floor": seconds["ours"] / floor,
        "peak_bytes": _peak(subjects["ours"], device),
        "faster_than": {n: s / seconds["ours"] for n, s in seconds.items() if n != "ours"},
    }


def ceilings(device: str) -> dict[str, float]:
    """What this machine does at most: a copy (read + write), a bfloat16 matrix product."""
    size, side = (2**30, 8192) if device == "cuda" else (2**22, 256)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copying = seconds_of(lambda: target.copy_(source), device)
    a = torch.randn(side, side, device=device).bfloat16()
    multiplying = seconds_of(lambda: a @ a, device)
    return {
        "copy, GB/s": 2e-9 * size / copying,
        "bfloat16 matrix product, TFLOP/s": 2e-12 * side**3 / multiplying,
    }


def seconds_of(call: Call, device: str) -> float:
    """Median seconds of a call, after calls that compile and warm up."""
    for _ in range(2):
        call()
    once = _seconds(call, device)
    repeats = max(REPEATS[0], min(REPEATS[1], int(SECONDS / max(once, 1e-6))))
    return median(_seconds(call, device) for _ in range(repeats))


def _seconds(call: Call, device: str) -> float:
    if device != "cuda":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _peak(call: Call, device: str) -> int | None:
    """Bytes beyond what was there before the call."""
    if device != "cuda":
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return int(torch.cuda.max_memory_allocated() - before)


def _gpu(device: str) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device == "cuda" else None
    versions = {package: _version(package) for package in ("triton", "fla-core")}
    return {"gpu": name, "cuda": torch.version.cuda, "hip": torch.version.hip, **versions}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    peers = "".join(f", {x:.2f} times as fast as {name}" for name, x in row["faster_than"].items())
    return (
        f"{row['family']:28} {row['tokens']:>9} tokens: {1e3 * row['seconds']['ours']:9.3f} ms, "
        f"{row['times_floor']:.1f} times its floor, error {row['errors']['ours']:.1e}{peers}"
    )
