"""Peak memory of loading a checkpoint, each in a process of its own.

    python -m rwkvx_evals.bench.load     measures one load; `rwkvx bench load` starts it

Counted is the growth of the resident set from just before the call, with everything imported, to
its peak: private memory and mapped pages of the file alike. Loading reads every weight once (the
check for NaN), so that all pages of a mapped file are resident and counted.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from rwkvx.checkpoint.checkpoint import Checkpoint
from rwkvx.checkpoint.formats import FORMATS
from rwkvx.errors import InputError
from rwkvx_evals.bench.machine import describe
from rwkvx_evals.bench.subjects import find_shape, random_model
from rwkvx_evals.files import write_json, write_text

Results = dict[str, Any]
STATUS = Path("/proc/self/status")
# Dtype of the file, dtype asked for.
DTYPES = (("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32"))


def run(shape: str, formats: tuple[str, ...], out: Path) -> Results:
    """Write random weights of a shape in each format, load each; results.json and report.md.

    Raises InputError for an unknown shape or format, or where memory cannot be measured.
    """
    config = find_shape(shape)
    for name in formats:
        if name not in FORMATS:
            raise InputError(f"no format {name!r}: choose from {', '.join(FORMATS)}")
    if not STATUS.exists():
        raise InputError("peak memory is read from /proc, which this system has not")
    checkpoint = Checkpoint.of(random_model(config))
    parameters = sum(x.numel() for x in checkpoint.tensors.values())
    rows = []
    with tempfile.TemporaryDirectory(prefix="rwkvx-bench-") as folder:
        for name in formats:
            for stored, asked in DTYPES:
                target = Path(folder) / f"{name}-{stored}"
                if name == "ggml" and stored != "float32":
                    continue
                if not target.exists():
                    FORMATS[name].write(checkpoint.to(getattr(torch, stored)), target)
                row = {"format": name, "stored": stored, "asked": asked}
                rows.append({**row, **measure_load(target, asked)})
    results = {
        "benchmark": "load",
        "machine": describe(),
        "model": {"name": Path(shape).stem, "parameters": parameters},
        "rows": rows,
    }
    write_json(out / "results.json", results)
    write_text(out / "report.md", render(results))
    return results


def measure_load(path: Path, dtype: str) -> dict[str, Any]:
    """Bytes of the checkpoint and growth of a fresh process while it loads it, and after.

    Raises InputError when that process ends early, as it does when memory runs out.
    """
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    size = sum(p.stat().st_size for p in files)
    command = [sys.executable, "-m", "rwkvx_evals.bench.load", str(path), dtype]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise InputError(f"loading {path.name} in a fresh process failed ({done.returncode})")
    grown = json.loads(done.stdout)
    return {"size": size, "ratio": grown["peak"] / size, **grown}


def child(path: str, dtype: str) -> dict[str, int]:
    """Load; how far the resident set rose at its peak, and what is resident afterwards."""
    import rwkvx

    load = rwkvx.load
    load("passkey-tiny", dtype=dtype)  # imports what the first load imports
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _resident()
    model = load(path, dtype=dtype)
    after = _resident()
    assert not model.training
    return {
        "peak": after["VmHWM"] - before["VmRSS"],
        "private": after["RssAnon"] - before["RssAnon"],
        "mapped": after["RssFile"] - before["RssFile"],
        "before": before["VmRSS"],
    }


def _resident() -> dict[str, int]:
    """Bytes by name, of this process."""
    rows = (line.split() for line in STATUS.read_text().splitlines())
    wanted = ("VmHWM:", "VmRSS:", "RssAnon:", "RssFile:")
    return {row[0][:-1]: 1024 * int(row[1]) for row in rows if row and row[0] in wanted}


def render(results: Results) -> str:
    """The Markdown report."""
    machine, model = results["machine"], results["model"]
    lines = [
        f"# Memory of loading: {model['name']}",
        "",
        f"- Model: {model['parameters']:,} parameters, random weights",
        f"- Machine: {machine['cpu']}, {machine['system']}",
        f"- torch {machine['torch']}, Python {machine['python']}, rwkvx {machine['rwkvx']}, "
        f"commit {machine['commit'] or 'unknown'}, {machine['date']}",
        "- Each load in a fresh process. Peak: growth of the resident set from just before "
        "`rwkvx.load` (Python and torch imported) to its highest point, private memory and mapped "
        "pages of the file alike. Private and mapped: growth until it returned.",
        "",
        "| format | stored | asked for | size, MB | peak, MB | peak / size | private, MB | "
        "mapped, MB |",
        "| :--- | :--- | :--- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in results["rows"]:
        numbers = (f"{row[name] / 1e6:,.1f}" for name in ("size", "peak"))
        rest = (f"{row[name] / 1e6:,.1f}" for name in ("private", "mapped"))
        cells = [row["format"], row["stored"], row["asked"], *numbers, f"**{row['ratio']:.2f}**"]
        lines.append(f"| {' | '.join([*cells, *rest])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(json.dumps(child(*sys.argv[1:])))
