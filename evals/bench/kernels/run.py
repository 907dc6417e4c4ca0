"""A whole kernel benchmark: ceilings of the machine, correctness, timings, the files."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from rwkvx.errors import InputError
from rwkvx_evals.bench.kernels import chunk_attention, models, training, wkv7
from rwkvx_evals.bench.kernels.budget import Budget, ordered
from rwkvx_evals.bench.kernels.case import OURS, Case
from rwkvx_evals.bench.kernels.energy import EnergyMeter, open_meter
from rwkvx_evals.bench.kernels.plot import draw
from rwkvx_evals.bench.kernels.report import line, pictures, render
from rwkvx_evals.bench.kernels.stopwatch import by_turns, free, peak_bytes, reason
from rwkvx_evals.bench.kernels.targets import summary
from rwkvx_evals.bench.machine import describe, installed
from rwkvx_evals.bench.timing import ratio
from rwkvx_evals.files import write_atomically, write_json, write_text

# Modules with a function `cases(device, lengths)`; of equal importance, the first come first.
FAMILIES = {
    "chunk_attention": chunk_attention,
    "models": models,
    "training": training,
    "wkv7": wkv7,
}
SECONDS = 1.0  # spent on timing all subjects of a case
ENERGY_SECONDS = 2.0  # spent on the energy of one subject
COPY, PRODUCT = "copy, GB/s", "bfloat16 matrix product, TFLOP/s"

Row = dict[str, Any]


class WrongResult(Exception):
    """Ours errs more than its tolerance."""


def run(
    families: Sequence[str],
    lengths: tuple[int, ...],
    out: Path,
    device: str = "cuda",
    seconds: float = 420,
    say: Callable[[str], None] = print,
    peers: bool = True,
) -> dict[str, Any]:
    """Measures for about `seconds`, and writes results.json (after every case), report.md and
    pictures into `out`.

    lengths: of every family; empty: its own. peers: whether others are timed beside ours. A case
    that fails or computes something wrong is recorded, and the others go on.

    Raises InputError where there is no GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("rwkvx bench kernels measures kernels on a GPU, and torch sees none here")
    budget, began = Budget(seconds), time.monotonic()
    meter, energy = open_meter(device)
    results: dict[str, Any] = {
        "benchmark": "kernels",
        "complete": False,
        "machine": describe() | _gpu(device),
        "energy": energy,
        "budget_seconds": seconds,
        "ceilings": {},
        "cases": [],
    }
    write_json(out / "results.json", results)  # a folder that cannot be written is said at once
    results["ceilings"] = ceilings(device)
    for name, value in results["ceilings"].items():
        say(f"ceiling: {name} {value:,.4g}")
    cases = ordered(c for family in families for c in FAMILIES[family].cases(device, lengths))
    if not peers:
        cases = [replace(case, errors={OURS: case.errors[OURS]}) for case in cases]
    stopped: str | None = None
    for number, case in enumerate(cases, 1):
        row = {"family": case.family, "tokens": case.tokens, "status": "left out"}
        lacks = stopped or budget.lacks(case)
        if lacks is None:
            row |= attempt(case, results["ceilings"], device, meter)
            stopped = _still_works(device)
        else:
            row["reason"] = lacks
        results["cases"].append(row)
        write_json(out / "results.json", results)
        say(f"[{number}/{len(cases)}, {max(0, budget.left()):.0f} s left] {line(row)}")
    results |= {"summary": summary(results["cases"]), "seconds": time.monotonic() - began}
    results["complete"] = True
    write_json(out / "results.json", results)
    for name, rows in pictures(results["cases"]).items():
        write_atomically(out / f"{name}.png", lambda path, rows=rows: draw(rows, results, path))  # type: ignore[misc]
    write_text(out / "report.md", render(results))
    return results


def attempt(case: Case, ceilings: dict[str, float], device: str, meter: EnergyMeter | None) -> Row:
    """The row of a case, with its status: measured, wrong, failed, or not there."""
    began = time.monotonic()
    try:
        row = {"status": "measured"} | measure(case, ceilings, device, meter)
    except WrongResult as error:
        row = {"status": "wrong", "reason": str(error)}
    except NotImplementedError as error:
        row = {"status": "not there", "reason": str(error)}
    except Exception as error:  # whatever a driver, a compiler or another package raises
        row = {"status": "failed", "reason": reason(error)}
    return row | {"took_seconds": time.monotonic() - began}


def measure(case: Case, ceilings: dict[str, float], device: str, meter: EnergyMeter | None) -> Row:
    """Errors first, then seconds of every subject by turns, memory and energy.

    Raises WrongResult for an error of ours above its tolerance, and whatever ours raises; what
    another subject raises is recorded.
    """
    errors, left_out = check(case)
    subjects = {name: x for name, x in case.subjects().items() if name in errors}
    seconds, others = by_turns(subjects, device, SECONDS)
    left_out |= others
    floors = {
        "bytes": case.bytes / (1e9 * ceilings[COPY]),
        "products": case.flops / (1e12 * ceilings[PRODUCT]),
    }
    units = case.units or case.tokens
    peak = peak_bytes(subjects[OURS], device)
    extra = None if peak is None else peak - case.outputs_bytes
    held = case.inputs_bytes + case.outputs_bytes
    joules = {}
    if case.energy and meter is not None:
        for name in seconds:
            joules[name] = meter.joules_of(subjects[name], ENERGY_SECONDS, device) / units
    return {
        "units": units,
        "bytes": case.bytes,
        "flops": case.flops,
        "errors": errors,
        "tolerance": case.tolerance,
        "seconds": seconds,
        "left_out": left_out,
        "floor_seconds": floors,
        "times_floor": median(seconds[OURS]) / max(floors.values()),
        "faster_than": {n: ratio(x, seconds[OURS]) for n, x in seconds.items() if n != OURS},
        "extra_bytes": extra,
        "over_inputs_and_outputs": extra / held if held and extra is not None else None,
        "joules_per_token": joules,
    }


def check(case: Case) -> tuple[dict[str, float], dict[str, str]]:
    """Errors against float64 by name, and why those of others could not be had."""
    errors, left_out = {}, {}
    for name, error in case.errors.items():
        try:
            errors[name] = error()
        except Exception as problem:
            if name == OURS:
                raise
            left_out[name] = reason(problem)
    if not errors[OURS] <= case.tolerance:
        raise WrongResult(
            f"relative error {errors[OURS]:.1e}, at most {case.tolerance:.1e} was expected; "
            "not timed"
        )
    return errors, left_out


def ceilings(device: str) -> dict[str, float]:
    """What this machine does at most: a copy (read + write), a bfloat16 matrix product."""
    size, side = (2**30, 8192) if device == "cuda" else (2**22, 256)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a = torch.randn(side, side, device=device).bfloat16()
    calls = {COPY: lambda: target.copy_(source), PRODUCT: lambda: a @ a}
    taken = {
        name: median(by_turns({OURS: x}, device, SECONDS)[0][OURS]) for name, x in calls.items()
    }
    return {COPY: 2e-9 * size / taken[COPY], PRODUCT: 2e-12 * side**3 / taken[PRODUCT]}


def _still_works(device: str) -> str | None:
    """Frees memory after a case; why nothing can follow where the GPU has given up."""
    try:
        free(device)
    except RuntimeError as error:
        return f"the GPU stopped working before: {reason(error)}"
    return None


def _gpu(device: str) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device == "cuda" else None
    packages = ("triton", "fla-core", "flash-attn", "nvidia-ml-py")
    versions = {package: installed(package) for package in packages}
    return {"gpu": name, "cuda": torch.version.cuda, "hip": torch.version.hip, **versions}
