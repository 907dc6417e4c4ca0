"""Timing by turns: A B C A B C, so that a slow moment of the machine meets all of them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from tqdm import tqdm


@dataclass(frozen=True)
class Run:
    """Something to time.

    Attributes:
        name: of the row in the results.
        call: what is timed. units: a timing is divided by it (tokens, passes).
        cost: rough share of the whole time, for the progress bar alone.
    """

    name: str
    call: Callable[[], object]
    units: int = 1
    cost: float = 1.0


def by_turns(
    runs: Sequence[Run], repeats: int, bar: tqdm[Any], warm_up: bool = True
) -> dict[str, list[float]]:
    """Seconds per unit of every run in every repeat, in the order taken; warm-ups not kept."""
    seconds: dict[str, list[float]] = {run.name: [] for run in runs}
    gc.collect()
    for turn in range(-1 if warm_up else 0, repeats):
        for run in runs:
            began = time.perf_counter()
            run.call()
            taken = time.perf_counter() - began
            if turn >= 0:
                seconds[run.name].append(taken / run.units)
            bar.update(run.cost)
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """`above` over `below`, pair by pair (the two of one turn), and of the smallest of each."""
    pairs = [a / b for a, b in zip(above, below, strict=True)]
    return {**spread(pairs), "of_smallest": min(above) / min(below)}
