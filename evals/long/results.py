"""What a finished run says: results.json and samples.jsonl, from the rows of its journal."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rwkvx_evals.files import write_text
from rwkvx_evals.long.rows import FAILURES
from rwkvx_evals.statistics import effective_length, summary

Results = dict[str, Any]
Row = dict[str, Any]

# Beyond so many different depths, they are shown in tenths.
DEPTHS = 12
# What only the journal needs.
NOT_SHOWN = frozenset({"key", "kind", "attempt", "tokens"})


def tally(rows: Sequence[Row], skipped: int = 0) -> dict[str, Any]:
    """Score and counts of samples.

    A sample that failed counts 0 in the score, which so is a lower bound, and is counted apart;
    one that was skipped was not asked. Where nothing was scored there is no score.
    """
    counts = {kind: sum(row["status"] == kind for row in rows) for kind in FAILURES}
    failed = sum(counts.values())
    scored = len(rows) - failed
    values = [row["score"] if row["status"] == "ok" else 0.0 for row in rows]
    return {
        **summary(values if scored else []),
        "asked": len(rows),
        "scored": scored,
        "failed": failed,
        "skipped": skipped,
        **counts,
        "truncated": sum(row["truncated"] > 0 for row in rows),
    }


def task_results(rows: Sequence[Row], skipped: Mapping[int, int]) -> dict[str, Any]:
    """Of one task: by length, by length and depth, and its effective length.

    skipped: how many samples of each length were not asked.
    """
    lengths = sorted({row["length"] for row in rows} | set(skipped))
    by_length = {n: [row for row in rows if row["length"] == n] for n in lengths}
    entries = {n: tally(found, skipped.get(n, 0)) for n, found in by_length.items()}
    curve = [(n, e["score"]) for n, e in entries.items() if e["score"] is not None]
    return {
        "effective_length": effective_length(curve),
        "lengths": {str(n): entry for n, entry in entries.items()},
        "depths": depth_cells(rows),
    }


def depth_cells(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Score by length and depth, for samples that say at which depth (0 to 1) the needle lies."""
    placed = [row for row in rows if isinstance(row["about"].get("depth"), int | float)]
    depths = sorted({round(float(row["about"]["depth"]), 6) for row in placed})
    tenths = len(depths) > DEPTHS
    cells: dict[tuple[int, float], list[Row]] = {}
    for row in placed:
        depth = round(float(row["about"]["depth"]), 6)
        if tenths:
            depth = min(9, int(10 * depth)) / 10 + 0.05
        cells.setdefault((row["length"], round(depth, 6)), []).append(row)
    return [
        {"length": length, "depth": depth, **tally(found)}
        for (length, depth), found in sorted(cells.items())
    ]


def total(rows: Sequence[Row], skipped: int) -> dict[str, int]:
    """Counts over all tasks."""
    found = tally(rows, skipped)
    names = ("asked", "scored", "failed", "skipped", *FAILURES, "truncated")
    return {name: found[name] for name in names}


def sample_rows(rows: Iterable[Row]) -> list[Row]:
    """Rows as samples.jsonl holds them: without what only the journal needs, in order."""
    shown = [{k: v for k, v in row.items() if k not in NOT_SHOWN} for row in rows]
    return sorted(shown, key=lambda row: (row["task"], row["length"], row["index"]))


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """One JSON object per line, the file whole or not at all."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    write_text(path, "".join(f"{line}\n" for line in lines))


def check_tokens(rows: Sequence[Row]) -> str | None:
    """A warning where an endpoint counted other prompts than were sent: it may have cut them."""
    pairs = [(r["endpoint_tokens"], r["prompt_tokens"]) for r in rows if r.get("endpoint_tokens")]
    if not pairs:
        return None
    ratios = np.array([told / sent for told, sent in pairs])
    if ratios.min() > 0.97 and ratios.max() < 1.03:
        return None
    return (
        f"the endpoint counted {ratios.min():.2f} to {ratios.max():.2f} times the prompt tokens "
        "that the tokenizer counted: it has another tokenizer, or cuts prompts"
    )
