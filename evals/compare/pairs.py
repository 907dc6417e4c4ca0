"""Runs read from their folders, and the differences between the answers to the same samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rwkvx.errors import InputError
from rwkvx.files import parse_json, read_json, read_lines
from rwkvx_evals.long.folder import RESULTS_BYTES
from rwkvx_evals.long.loss import NAME
from rwkvx_evals.long.results import NOT_SHOWN
from rwkvx_evals.long.rows import check_fields
from rwkvx_evals.statistics import Z, standard_error

Row = dict[str, Any]
_NAMED = ("model", "weights", "date")
ROWS_BYTES = 4_000_000_000  # read one line at a time


@dataclass(frozen=True)
class Run:
    """A finished run. label: the model's name, or the folder's where that tells more."""

    folder: Path
    label: str
    results: dict[str, Any]
    samples: dict[str, Row]
    windows: dict[str, Row]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """All runs, under different labels.

    Raises InputError: fewer than two folders, one without a finished run, a damaged file.
    """
    if len(folders) < 2:
        raise InputError("two finished runs are needed at least: eval compare DIR_A DIR_B")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError("one folder is named twice: a run does not differ from itself")
    found = [_read_run(folder) for folder in folders]
    labels = [run.label for run in found]
    if len(set(labels)) == len(labels):
        return found
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    return [
        Run(r.folder, name, r.results, r.samples, r.windows)
        for r, name in zip(found, names, strict=True)
    ]


def _read_run(folder: Path) -> Run:
    results, samples = folder / "results.json", folder / "samples.jsonl"
    if not results.is_file() or not samples.is_file():
        raise InputError(
            f"{folder} holds no finished run of eval long (results.json and samples.jsonl): "
            "give its command again to finish it"
        )
    windows = folder / "windows.jsonl"
    found = read_json(results, RESULTS_BYTES)
    named = found if isinstance(found, dict) else {}
    if not all(isinstance(named.get(name), str) for name in _NAMED):
        raise InputError(
            f"{results} is damaged, or no run of eval long: {', '.join(_NAMED)} are missing"
        )
    losses = _rows(windows, "window") if windows.is_file() and NAME in found else {}
    return Run(folder, found["model"], found, _rows(samples, "sample"), losses)


def _rows(file: Path, kind: str) -> dict[str, Row]:
    """Rows by id. Raises InputError for one that is none of `kind`."""
    rows = {}
    for number, line in enumerate(read_lines(file, ROWS_BYTES), start=1):
        row = parse_json(line, f"{file} line {number}") if line.strip() else None
        if row is None:
            continue
        try:
            check_fields(row, kind, without=NOT_SHOWN)
        except ValueError as error:
            raise InputError(f"{file} line {number} is damaged: {error}") from error
        rows[row["id"]] = row
    return rows


def compare(a: Run, b: Run) -> list[dict[str, Any]]:
    """b minus a, over all tasks, for each task, for each task and length, and for the loss.

    Samples are paired where both runs asked the very same one. Where they share none (another
    tokenizer, another seed), the means are compared, with a larger error. A failed sample counts
    0, as in the scores.

    Raises InputError when the runs have no task and length in common.
    """
    groups: dict[tuple[str, int], tuple[list[Row], list[Row]]] = {}
    for side, run in enumerate((a, b)):
        for row in run.samples.values():
            groups.setdefault((row["task"], row["length"]), ([], []))[side].append(row)
    common = {key: sides for key, sides in groups.items() if all(sides)}
    tasks, found = sorted({task for task, _ in common}), []
    if len(tasks) > 1:
        found.append(_difference("all tasks", None, *_joined(list(common.values()))))
    for task in tasks:
        chosen = [sides for (name, _), sides in common.items() if name == task]
        if len(chosen) > 1:
            found.append(_difference(task, None, *_joined(chosen)))
    found += [_difference(task, length, *common[task, length]) for task, length in sorted(common)]
    found += _losses(a, b)
    if not found:
        raise InputError(f"{a.folder} and {b.folder} have no task and length in common")
    return found


def _joined(groups: list[tuple[list[Row], list[Row]]]) -> tuple[list[Row], list[Row]]:
    return [row for left, _ in groups for row in left], [
        row for _, right in groups for row in right
    ]


def _difference(task: str, length: int | None, a: list[Row], b: list[Row]) -> dict[str, Any]:
    left, right = ({row["id"]: row for row in side} for side in (a, b))
    same = [i for i in left if i in right and left[i]["prompt"] == right[i]["prompt"]]
    paired = bool(same)
    if paired:
        x, y = ([_score(side[i]) for i in same] for side in (left, right))
        # Differences lie between -1 and 1: halved and moved they are scores, whose error is known.
        error = 2 * standard_error([(1 + v - u) / 2 for u, v in zip(x, y, strict=True)])
    else:
        x, y = ([_score(row) for row in side] for side in (a, b))
        error = math.hypot(standard_error(x), standard_error(y))
    difference = math.fsum(y) / len(y) - math.fsum(x) / len(x)
    return {
        "task": task,
        "length": length,
        "n": len(same) if paired else min(len(x), len(y)),
        "paired": paired,
        "a": round(math.fsum(x) / len(x), 6),
        "b": round(math.fsum(y) / len(y), 6),
        "difference": round(difference, 6),
        "stderr": round(error, 6),
        "significant": abs(difference) > Z * error,
        "failed": sum(row["status"] != "ok" for row in (*a, *b)),
    }


def _score(row: Row) -> float:
    return float(row["score"]) if row["status"] == "ok" else 0.0


def _losses(a: Run, b: Run) -> list[dict[str, Any]]:
    """Loss of the same windows, in nats; there is no difference without a pair."""
    found = []
    lengths = sorted({row["length"] for row in a.windows.values()})
    for length in lengths:
        pairs = [
            (_loss(row), _loss(b.windows[name]))
            for name, row in a.windows.items()
            if row["length"] == length and name in b.windows
            and b.windows[name]["prompt"] == row["prompt"]
            and row["status"] == b.windows[name]["status"] == "ok"
        ]  # fmt: skip
        if not pairs:
            continue
        n, gains = len(pairs), [y - x for x, y in pairs]
        mean = math.fsum(gains) / n
        error = None
        if n > 1:
            error = math.sqrt(math.fsum((g - mean) ** 2 for g in gains) / (n - 1) / n)
        found.append(
            {
                "task": NAME,
                "length": length,
                "n": n,
                "paired": True,
                "a": round(math.fsum(x for x, _ in pairs) / n, 6),
                "b": round(math.fsum(y for _, y in pairs) / n, 6),
                "difference": round(mean, 6),
                "stderr": None if error is None else round(error, 6),
                "significant": error is not None and abs(mean) > Z * error,
                "failed": 0,
            }
        )
    return found


def _loss(row: Row) -> float:
    if row["status"] != "ok":
        return math.nan
    return math.fsum(b[3] for b in row["buckets"]) / sum(b[2] for b in row["buckets"])
