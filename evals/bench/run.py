"""A whole CPU benchmark: what is asked, the measurements in their order, the files."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from rwkvx.errors import InputError
from rwkvx.progress import progress
from rwkvx.quantize import quantize
from rwkvx_evals.bench import measure
from rwkvx_evals.bench.floor import Products
from rwkvx_evals.bench.machine import describe, warnings
from rwkvx_evals.bench.memory import measure_memory
from rwkvx_evals.bench.peers import open_peer
from rwkvx_evals.bench.plot import draw_speed
from rwkvx_evals.bench.report import render
from rwkvx_evals.bench.subjects import open_model
from rwkvx_evals.files import write_atomically, write_json, write_text

Results = dict[str, Any]
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Settings:
    """What to measure. Lengths are tokens; empty or 0 leaves a part out."""

    model: str
    lengths: tuple[int, ...]
    decode: int
    long: tuple[int, ...]
    window: int
    memory: int
    dtype: str
    selection: str
    threads: int
    repeats: int
    peer: str
    peer_dtype: str

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise InputError(f"{self.repeats} repeats: at least one is needed")
        if self.threads < 1:
            raise InputError(f"{self.threads} threads: at least one is needed")
        if self.decode < 0:
            raise InputError(f"{self.decode} tokens to decode: 0 or more are needed")
        if any(length < 2 for length in self.lengths):
            raise InputError("a prefill is of 2 tokens or more")
        if self.long and min(self.long) <= self.window:
            raise InputError(
                f"--long {min(self.long)} leaves nothing before its last {self.window} tokens "
                "(--window)"
            )
        if self.window < 1:
            raise InputError(f"a window of {self.window} tokens: at least one is needed")
        if not (self.lengths or self.long or self.memory):
            raise InputError("nothing to measure: give --lengths, --long or --memory")

    def cost(self, peer: bool) -> float:
        """Of everything, for the progress bar."""
        total = sum(measure.prefill_cost(n, self.repeats, peer) for n in self.lengths)
        if self.decode:
            total += len(self.lengths) * measure.decode_cost(self.decode, self.repeats, peer)
        return total + sum(self.long) + self.memory


def run(settings: Settings, out: Path, quiet: bool = False) -> Results:
    """Measures, and writes results.json (after every part), speed.png and report.md into `out`.

    Raises InputError for an unknown model, logits that differ from the peer's, a full disk.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        return _run(settings, out, quiet)
    finally:
        torch.set_num_threads(before)


def _run(settings: Settings, out: Path, quiet: bool) -> Results:
    machine = describe()
    stored = "bfloat16" if settings.dtype == "int8" else settings.dtype
    model, origin = open_model(settings.model, stored, settings.selection)
    results: Results = {
        "benchmark": "cpu",
        "complete": False,
        "machine": machine,
        "warnings": warnings(machine),
        "settings": {**asdict(settings)},
        "model": {
            "name": Path(settings.model).name,
            "weights": origin,
            "parameters": sum(x.numel() for x in model.parameters()),
            "config": model.config.to_dict(),
        },
    }
    write_json(out / "results.json", results)  # a folder that cannot be written is said at once
    wanted = settings.peer if settings.lengths else "none"
    peer, words = open_peer(model, settings.peer_dtype, wanted)
    if settings.dtype == "int8":
        quantize(model)
    results["peer"] = {"measured": peer is not None, "words": words}
    longest = max((*settings.lengths, *settings.long, settings.decode, 2))
    ids = measure.random_ids(model, longest)
    subjects = measure.Subjects(model, peer, Products(model), ids)
    line = "{desc}{percentage:3.0f}% |{bar}| {elapsed} so far, {remaining} left"
    with progress(settings.cost(peer is not None), quiet=quiet, bar_format=line) as bar:
        _measure(settings, subjects, results, out, bar)
    results["complete"] = True
    _write(results, out)
    return results


def _measure(
    settings: Settings,
    subjects: measure.Subjects,
    results: Results,
    out: Path,
    bar: tqdm[Any],
) -> None:
    if settings.lengths and settings.dtype == "bfloat16":
        bar.set_description("check")
        results["check"] = measure.check_reduced(subjects, min(settings.lengths))
    for length in settings.lengths:
        bar.set_description(f"prefill {length}")
        entry = measure.measure_prefill(subjects, length, settings.repeats, bar)
        results.setdefault("prefill", []).append(entry)
        if settings.decode:
            bar.set_description(f"decode after {length}")
            entry = measure.measure_decode(subjects, length, settings.decode, settings.repeats, bar)
            results.setdefault("decode", []).append(entry)
        write_json(out / "results.json", results)
    subjects.states.clear()
    if settings.long:
        bar.set_description("long prefill")
        results["long"] = measure.measure_long(subjects, settings.long, settings.window, bar)
        write_json(out / "results.json", results)
    if settings.memory:
        bar.set_description("memory")
        subject = (settings.model, settings.dtype, settings.selection)
        results["memory"] = measure_memory(subject, settings.memory, settings.threads, bar)


def _write(results: Results, out: Path) -> None:
    write_json(out / "results.json", results)
    if "prefill" in results:
        write_atomically(out / "speed.png", lambda path: draw_speed(results, path))
    write_text(out / "report.md", render(results))
