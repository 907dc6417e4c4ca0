"""Results and table of an lm-eval run; nothing here depends on the time it took."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rwkvx_evals.files import package_version

Results = dict[str, Any]


def clean(value: Any) -> Any:
    """A JSON value without not-a-number, which JSON does not have, and without functions."""
    if isinstance(value, Mapping):
        return {str(key): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)


def collect(
    found: Mapping[str, Any],
    *,
    model: str,
    weights: str,
    sources: Mapping[str, str],
    asked: Mapping[str, int],
    failures: Mapping[str, Mapping[str, int]],
    truncated: int,
    settings: Mapping[str, Any],
) -> Results:
    """Everything a report says, from lm-eval's own results.

    A task with failed requests has no score: it is neither wrong there nor fewer.
    """
    tasks = sorted(sources)
    return {
        "model": model,
        "weights": weights,
        "version": package_version(),
        "settings": clean(settings),
        "data": {task: sources[task] for task in tasks},
        "requests": {
            task: {
                "asked": asked.get(task, 0),
                "scored": asked.get(task, 0) - sum(failures.get(task, {}).values()),
                "failed": sum(failures.get(task, {}).values()),
                **dict(failures.get(task, {"oom": 0, "invalid": 0})),
            }
            for task in tasks
        },
        "truncated": truncated,
        "table": _table(found, failures),
        "lm_eval": {
            key: clean(found[key])
            for key in ("results", "versions", "n-shot", "higher_is_better", "n-samples")
            if key in found
        },
    }


def _table(
    found: Mapping[str, Any], failures: Mapping[str, Mapping[str, int]]
) -> list[dict[str, Any]]:
    """One row per task and metric: value, standard error, number of items."""
    table = []
    for task, metrics in sorted(found["results"].items()):
        failed = sum(failures.get(task, {}).values())
        for name, value in metrics.items():
            metric, _, name_filter = name.partition(",")
            if (
                metric == "alias"
                or metric.endswith("_stderr")
                or not isinstance(value, float | int)
            ):
                continue
            if not name_filter:
                continue
            error = metrics.get(f"{metric}_stderr,{name_filter}")
            table.append(
                {
                    "task": task,
                    "metric": metric,
                    "value": None if failed else clean(value),
                    "stderr": None if failed else clean(error if error != "N/A" else None),
                    "n": found["n-samples"].get(task, {}).get("effective"),
                }
            )
    return table


def _figure(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"


def render(results: Results) -> str:
    """The Markdown report."""
    lines = [
        f"# lm-eval: {results['model']}",
        "",
        *(f"- Data of {task}: {source}" for task, source in results["data"].items()),
        f"- Weights {results['weights'][:16]}, rwkvx {results['version']}, "
        f"lm-eval {results['settings']['lm_eval']}, {results['settings']['dtype']}",
    ]
    if results["settings"]["limit"] is not None:
        lines.append(f"- Only the first {results['settings']['limit']} items of each task")
    if results["truncated"]:
        lines.append(f"- Truncated requests: {results['truncated']}")
    lines += [
        "",
        "![scores](scores.png)",
        "",
        "| task | metric | value | standard error | items |",
        "|---|---|---:|---:|---:|",
    ]
    for row in results["table"]:
        lines.append(
            f"| {row['task']} | {row['metric']} | {_figure(row['value'])} | "
            f"{_figure(row['stderr'])} | {row['n']} |"
        )
    lines += ["", "| task | requests asked | scored | failed |", "|---|---:|---:|---:|"]
    for task, counts in results["requests"].items():
        failed = str(counts["failed"])
        if counts["failed"]:
            failed += f" ({counts['oom']} out of memory, {counts['invalid']} not a number)"
        lines.append(f"| {task} | {counts['asked']} | {counts['scored']} | {failed} |")
    return "\n".join(lines) + "\n"
