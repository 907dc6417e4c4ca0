"""Counts and their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def accuracy(correct: int, asked: int) -> tuple[float, float]:
    """Share of right answers and its binomial standard error; failed samples stay in `asked`."""
    share = correct / asked
    return share, math.sqrt(share * (1.0 - share) / asked)


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
