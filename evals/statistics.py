"""Counts and their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

# The 97.5 % point of the normal distribution: intervals here hold 95 %.
Z = 1.959964


def accuracy(correct: int, asked: int) -> tuple[float, float | None]:
    """Share of right answers and its binomial standard error; failed samples stay in `asked`.

    The error is None where all or none are right: the formula says 0 there, which would be
    certainty. `wilson` says what is known.
    """
    share = correct / asked
    if correct in (0, asked):
        return share, None
    return share, math.sqrt(share * (1.0 - share) / asked)


def wilson(
    correct: float, asked: int, variance: float | None = None, z: float = Z
) -> tuple[float, float]:
    """The 95 % interval of a share, also where all or none are right.

    Wilson, "Probable inference, the law of succession, and statistical inference" (1927).

    Args:
        correct: right answers, or the sum of scores in 0 to 1.
        variance: of the scores, divided by `asked`; None for answers right or wrong.
        z: half of the width in standard errors.
    """
    share, extra = correct / asked, z * z / asked
    if variance is None:
        variance = share * (1 - share)
    middle = (share + extra / 2) / (1 + extra)
    half = z * math.sqrt(variance / asked + extra / asked / 4) / (1 + extra)
    # The ends are exact where rounding could leave the share itself outside.
    low = 0.0 if share == 0.0 else middle - half
    return low, 1.0 if share == 1.0 else middle + half


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of scores in 0 to 1: half of Wilson's interval at one standard error.

    It is never 0, also where all scores are equal.
    """
    low, high = wilson(math.fsum(values), len(values), _variance(values), 1.0)
    return (high - low) / 2


def summary(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, standard error and 95 % interval of scores in 0 to 1; None where there are none."""
    if not values:
        return {"score": None, "stderr": None, "low": None, "high": None}
    total = math.fsum(values)
    low, high = wilson(total, len(values), _variance(values))
    mean, error = total / len(values), standard_error(values)
    found = {"score": mean, "stderr": error, "low": low, "high": high}
    return {name: round(value, 6) for name, value in found.items()}


def _variance(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.fsum((v - mean) ** 2 for v in values) / len(values)


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
        "stderr": None if error is None else round(error, 6),
        "interval": [round(end, 6) for end in wilson(correct, len(rows))],
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
