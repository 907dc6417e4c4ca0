"""Counts and their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

# Standard normal quantile of a two-sided 95 % interval.
Z95 = 1.959964


def wilson(mean: float, variance: float, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a mean of values in 0 to 1, (low, high).

    It is right where the plain standard error is not: 50 of 50 right answers are no proof of
    100 %. variance: of the values, divided by n; for answers right or wrong mean * (1 - mean).
    Source: E. B. Wilson, JASA 22 (1927), with the sample's variance in place of the binomial one.
    """
    centre = mean + z * z / (2 * n)
    half = z * math.sqrt(max(variance, 0.0) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def standard_error(mean: float, variance: float, n: int) -> float:
    """Half of Wilson's interval at one standard deviation: never 0, also not at 0 and 100 %."""
    scale = 1 + 1 / n
    return math.sqrt(max(variance, 0.0) / n + 1 / (4 * n * n)) / scale


def accuracy(correct: int, asked: int) -> tuple[float, float]:
    """Share of right answers and its standard error; failed samples stay in `asked`."""
    share = correct / asked
    return share, standard_error(share, share * (1.0 - share), asked)


def summary(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, standard error and 95 % interval of scores in 0 to 1; None where there are none."""
    n = len(values)
    if not n:
        return {"score": None, "stderr": None, "low": None, "high": None}
    mean = math.fsum(values) / n
    variance = math.fsum((v - mean) ** 2 for v in values) / n
    low, high = wilson(mean, variance, n)
    found = {"score": mean, "stderr": standard_error(mean, variance, n), "low": low, "high": high}
    return {name: round(value, 6) for name, value in found.items()}


def tally(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Asked, scored, failed and accuracy of journal rows with "status" and "correct"."""
    counts = {status: sum(row["status"] == status for row in rows) for status in ("oom", "invalid")}
    failed = sum(counts.values())
    correct = sum(bool(row["correct"]) for row in rows)
    share, error = accuracy(correct, len(rows))
    return {
        "asked": len(rows),
        "scored": len(rows) - failed,
        "failed": failed,
        **counts,
        "correct": correct,
        "accuracy": round(share, 6),
        "stderr": round(error, 6),
    }


def effective_length(
    accuracy_by_length: Sequence[tuple[int, float]], share: float = 0.85
) -> int | None:
    """The longest length up to which accuracy stays at `share` of that at the shortest, or more.

    accuracy_by_length: ascending lengths. None when nothing is right at the shortest length.
    """
    if not accuracy_by_length or accuracy_by_length[0][1] <= 0.0:
        return None
    wanted = share * accuracy_by_length[0][1]
    longest = None
    for length, value in accuracy_by_length:
        if value < wanted:
            break
        longest = length
    return longest
