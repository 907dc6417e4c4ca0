"""Training steps on a CPU: time over the products alone, memory by length, several processes.

    python -m rwkvx_evals.bench.training SETTINGS     one measurement in a process of its own

A step reads random tokens: forward, backward, gradient norm, optimiser. Axes: B batch, T time.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import nn

import rwkvx
from rwkvx.errors import InputError
from rwkvx.progress import progress
from rwkvx.training.distributed import distributed, joined
from rwkvx.training.forward import Objective
from rwkvx.training.world import World
from rwkvx_evals.bench.floor import low_rank_of
from rwkvx_evals.bench.machine import describe
from rwkvx_evals.bench.step import Step, fresh_model, random_batch
from rwkvx_evals.bench.subjects import find_shape
from rwkvx_evals.bench.timing import Run, by_turns, ratio, spread
from rwkvx_evals.files import peak_memory_bytes, write_json, write_text

Results = dict[str, Any]
STEPS = 7  # of a process among several, two of which warm up


@dataclass(frozen=True)
class Settings:
    """What to measure. Lengths are tokens.

    Attributes:
        model: a shape. length: of the sequence of a timed step.
        lengths: for peak memory, at as many tokens a step as the longest has; empty: leave out.
        processes: that train together, each on one core; 1: leave out.
        precision: "float32" or "bf16" (autocast).
    """

    model: str
    length: int
    lengths: tuple[int, ...]
    processes: int
    precision: str
    threads: int
    repeats: int

    def __post_init__(self) -> None:
        if self.length < 2 or any(length < 2 for length in self.lengths):
            raise InputError("a step reads sequences of 2 tokens or more")
        longest = max(self.lengths, default=0)
        odd = [length for length in self.lengths if longest % length]
        if odd:
            raise InputError(f"--memory: {longest} tokens a step are no multiple of {odd[0]}")


def step_of(settings: Settings, rows: int, length: int, world: World | None = None) -> Step:
    """A step of rows of so many tokens, which this process reads."""
    model = fresh_model(find_shape(settings.model))
    called = None if world is None else distributed(Objective(model), world, "ddp", False)
    batch = random_batch(model.config.vocab_size, rows, length)
    return Step(model, batch, settings.precision == "bf16", called)


class Products:
    """The products of a step with the model's weights, alone: one forward, two backward.

    Those of its Linear modules and low-rank factors, on so many tokens, in the step's precision.
    """

    def __init__(self, model: rwkvx.Model, tokens: int, half: bool) -> None:
        dtype = torch.bfloat16 if half else torch.float32
        linear = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
        self._weights = [x.detach().to(dtype) for x in (*linear, *low_rank_of(model))]
        widths = {n for x in self._weights for n in x.shape}
        self._inputs = {n: torch.randn(tokens, n).to(dtype) for n in sorted(widths)}
        self.flops = sum(6 * tokens * x.numel() for x in self._weights)

    def __call__(self) -> None:
        for weight in self._weights:
            x, gradient = (self._inputs[n] for n in weight.shape)
            _ = x @ weight, gradient @ weight.t(), x.t() @ gradient


class Child(NamedTuple):
    """What a measurement in a process of its own says.

    Attributes:
        seconds: of every step; tokens: of a step of this process; peak: bytes.
    """

    seconds: list[float]
    tokens: int
    peak: int


def run(settings: Settings, out: Path, quiet: bool = False) -> Results:
    """Measures, and writes results.json (after every part) and report.md into `out`."""
    find_shape(settings.model)
    results: Results = {
        "benchmark": "training",
        "complete": False,
        "machine": describe(),
        "settings": asdict(settings),
    }
    write_json(out / "results.json", results)
    total = 2 * (settings.repeats + 1) + len(settings.lengths)
    total += 2 * turns(settings) * (settings.processes > 1)
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        with progress(total, quiet=quiet) as bar:
            bar.set_description("step")
            results["step"] = measure_step(settings, bar)
            write_json(out / "results.json", results)
            results["memory"] = []
            for length in settings.lengths:
                bar.set_description(f"memory of {length}")
                rows = max(settings.lengths) // length
                child = _alone(settings, rows, length, settings.threads, steps=2)
                results["memory"].append({"tokens": length, "rows": rows, "peak": child.peak})
                bar.update()
                write_json(out / "results.json", results)
            if settings.processes > 1:
                bar.set_description("processes")
                results["processes"] = measure_processes(settings, bar)
    finally:
        torch.set_num_threads(before)
    results["complete"] = True
    write_json(out / "results.json", results)
    write_text(out / "report.md", render(results))
    return results


def measure_step(settings: Settings, bar: Any) -> Results:
    """A step and its products, by turns."""
    step = step_of(settings, 1, settings.length)
    products = Products(step.model, settings.length, step.half)
    runs = [Run("step", step), Run("products", products)]
    seconds = by_turns(runs, settings.repeats, bar)
    return {
        "parameters": sum(x.numel() for x in step.model.parameters()),
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "ratio": ratio(seconds["step"], seconds["products"]),
        "products_flops_per_second": products.flops / median(seconds["products"]),
        "tokens_per_second": settings.length / median(seconds["step"]),
    }


def measure_processes(settings: Settings, bar: Any) -> Results:
    """Tokens a second of processes that train together, one core each, over those of one; one and
    all take turns."""
    rows = (4, settings.length // 4)
    alone, together = [], []
    for _ in range(turns(settings)):
        alone.append(_speed(_alone(settings, *rows, 1, STEPS)))
        bar.update()
        together.append(sum(_speed(x) for x in _together(settings, *rows, STEPS)))
        bar.update()
    sums = [settings.processes * x for x in alone]
    return {"alone": spread(alone), "together": spread(together), "share": ratio(together, sums)}


def turns(settings: Settings) -> int:
    """How often one process and several are measured."""
    return min(settings.repeats, 3)


def _speed(child: Child) -> float:
    """Tokens a second, without the two steps that warm up."""
    return child.tokens / median(child.seconds[2:])


def _alone(settings: Settings, batch: int, length: int, threads: int, steps: int) -> Child:
    """In a fresh process."""
    return _finish(_start(settings, batch, length, threads, steps, {}))


def _together(settings: Settings, batch: int, length: int, steps: int) -> list[Child]:
    """In as many fresh processes as are asked for, which share gradients."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    size = settings.processes
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    children = [
        _start(settings, batch, length, 1, steps, {**place, "RANK": str(i)}) for i in range(size)
    ]
    return [_finish(child) for child in children]


def _start(
    settings: Settings, batch: int, length: int, threads: int, steps: int, place: dict[str, str]
) -> subprocess.Popen[str]:
    values = {"settings": asdict(settings), "batch": batch, "length": length, "steps": steps}
    command = [sys.executable, "-m", "rwkvx_evals.bench.training", json.dumps(values)]
    count = str(threads)
    environment = {**os.environ, "OMP_NUM_THREADS": count, "NUMBA_NUM_THREADS": count, **place}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def _finish(child: subprocess.Popen[str]) -> Child:
    written, _ = child.communicate()
    if child.returncode:
        raise InputError(f"a training step in a fresh process failed (status {child.returncode})")
    return Child(**json.loads(written))


def child_steps(settings: Settings, batch: int, length: int, steps: int) -> Child:
    """So many steps in this process, one of those that its environment names."""
    seconds = []
    with joined("cpu") as (world, _):
        step = step_of(settings, batch, length, world)
        for _ in range(steps):
            began = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - began)
    return Child(seconds, batch * length, peak_memory_bytes())


def render(results: Results) -> str:
    """The report."""
    machine, settings, step = results["machine"], results["settings"], results["step"]
    at = step["ratio"]
    lines = [
        f"# Training steps on a CPU: {Path(settings['model']).stem}",
        "",
        f"- {step['parameters']:,} parameters, {settings['precision']}, random tokens",
        f"- Machine: {machine['cpu']}, {settings['threads']} threads; torch {machine['torch']}, "
        f"commit {machine['commit'] or 'unknown'}, {machine['date']}",
        f"- {settings['repeats']} repeats by turns after a warm-up; a ratio is taken within each",
        "",
        f"A step of {settings['length']:,} tokens takes {step['seconds']['step']['median']:.2f} s "
        f"({step['tokens_per_second']:,.0f} tokens/s): **{at['median']:.2f} times** "
        f"({at['min']:.2f} to {at['max']:.2f}) its products with the weights alone, which run at "
        f"{step['products_flops_per_second'] / 1e9:,.0f} GFLOP/s.",
    ]
    if results["memory"]:
        least = min(row["peak"] for row in results["memory"])
        lines += ["", "| tokens of a sequence | sequences | peak memory | over the least |"]
        lines += ["|---:|---:|---:|---:|"]
        lines += [
            f"| {row['tokens']:,} | {row['rows']} | {row['peak'] / 2**20:,.0f} MiB | "
            f"{row['peak'] / least:.2f} |"
            for row in results["memory"]
        ]
    if "processes" in results:
        found = results["processes"]
        share = found["share"]
        lines += [
            "",
            f"{settings['processes']} processes that share gradients (DDP, gloo), one core each: "
            f"{found['together']['median']:,.0f} tokens/s in all; one alone on one core: "
            f"{found['alone']['median']:,.0f}. **{share['median']:.2f}** of the sum "
            f"({share['min']:.2f} to {share['max']:.2f} in turns).",
        ]
    return "\n".join(lines) + "\n"


def main(argument: str) -> None:
    """Of the process that measures."""
    values = json.loads(argument)
    settings = values.pop("settings")
    settings["lengths"] = tuple(settings["lengths"])
    print(json.dumps(child_steps(Settings(**settings), **values)._asdict()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
