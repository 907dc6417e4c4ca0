"""Results and table of an lm-eval run; nothing here depends on the time it took."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rwkvx_evals.files import package_version
from rwkvx_evals.lm.model import RwkvxLM
from rwkvx_evals.lm.settings import Settings
from rwkvx_evals.lm.tasks import Sources
from rwkvx_evals.statistics import wilson

Results = dict[str, Any]

# Means of right and wrong; others may leave 0 to 1, or be no means.
SHARES = ("acc", "exact_match")
_COUNTS = {
    "truncated": "requests were truncated",
    "merged": "continuations begin inside a token of their context, and are scored from that token",
    "empty": "continuations are empty, and certain",
}


def clean(value: Any) -> Any:
    """A JSON value without not-a-number, which JSON does not have, and without functions."""
    if isinstance(value, Mapping):
        return {str(key): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
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
    sources: Sources,
    lm: RwkvxLM,
    settings: Settings,
    chance: Mapping[str, float],
    warnings: Mapping[str, int],
    facts: Mapping[str, Any],
) -> Results:
    """Everything a report says, from lm-eval's own results.

    A task with failed requests has no score: it is neither wrong there nor fewer. facts: further
    numbers that decide the results.
    """
    tasks = sorted(sources.by_task)
    shots = found.get("n-shot", {})
    own = sorted(task for task in sources.own_items if shots.get(task))
    return {
        "model": model,
        "weights": weights,
        "version": package_version(),
        "settings": clean({**settings.as_dict(), **facts}),
        "data": {task: sources.by_task[task] for task in tasks},
        "notes": {task: sources.notes[task] for task in tasks if task in sources.notes},
        "few_shot_from_evaluated_items": own,
        "decoding": {task: sorted(words) for task, words in sorted(lm.decoding.items())},
        "requests": {task: _requests(task, lm) for task in tasks},
        "warnings": dict(sorted(warnings.items())),
        "counts": {name: lm.counts[name] for name in _COUNTS},
        "table": _table(found, lm.failures, chance),
        "lm_eval": {
            key: clean(found[key])
            for key in ("results", "groups", "versions", "n-shot", "higher_is_better", "n-samples")
            if key in found
        },
    }


def _requests(task: str, lm: RwkvxLM) -> dict[str, int]:
    asked = lm.asked.get(task, 0)
    failures = {"oom": 0, "invalid": 0, **lm.failures.get(task, {})}
    failed = sum(failures.values())
    return {"asked": asked, "scored": asked - failed, "failed": failed, **failures}


def _table(
    found: Mapping[str, Any],
    failures: Mapping[str, Mapping[str, int]],
    chance: Mapping[str, float],
) -> list[dict[str, Any]]:
    """One row per task or group and metric: value, uncertainty, items, shots, chance."""
    table, groups = [], found.get("group_subtasks", {})
    for task, metrics in sorted(found["results"].items()):
        failed = any(sum(failures.get(t, {}).values()) for t in _members(task, found))
        for name, value in metrics.items():
            metric, _, name_filter = name.partition(",")
            number = isinstance(value, float | int) and not isinstance(value, bool)
            if not name_filter or metric.endswith("_stderr") or not number:
                continue
            error = metrics.get(f"{metric}_stderr,{name_filter}")
            items = metrics.get("sample_len")
            row = {
                "task": task,
                "group": task in groups,
                "in_group": any(task in children for children in groups.values()),
                "metric": metric,
                "filter": name_filter,
                "value": None if failed else clean(value),
                "stderr": None if failed or error == "N/A" else clean(error),
                "interval": None,
                "n": items,
                "shots": found.get("n-shot", {}).get(task),
                "chance": chance.get(task) if metric.startswith("acc") else None,
            }
            # A deviation of 0 is not certainty.
            if row["value"] in (0, 1) and metric.startswith(SHARES) and items:
                row["interval"] = [round(end, 6) for end in wilson(value * items, items)]
                row["stderr"] = None
            table.append(row)
    return table


def _members(task: str, found: Mapping[str, Any]) -> list[str]:
    """A task, or the tasks of a group at any depth."""
    children = found.get("group_subtasks", {}).get(task)
    return [task] if children is None else [m for c in children for m in _members(c, found)]


def uncertainty(row: Mapping[str, Any]) -> str:
    """The standard error of a value, the 95 % interval where all or none are right, or nothing."""
    if row["stderr"] is not None:
        return f"± {row['stderr']:.4f}"
    if row["interval"] is not None:
        return f"{row['interval'][0]:.4f} to {row['interval'][1]:.4f} (95 %)"
    return ""


def _figure(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"


def remarks(results: Results) -> list[str]:
    """What a reader must know beside the numbers, one sentence each."""
    lines = [f"{task}: {note}" for task, note in results["notes"].items()]
    if own := results["few_shot_from_evaluated_items"]:
        lines.append(
            f"Few-shot examples of {', '.join(own)} are other evaluated items: their training "
            "split is not there"
        )
    lines += [f"{task}: {' / '.join(w)}" for task, w in results["decoding"].items()]
    lines += [f"lm-eval warns ({n} ×): {text}" for text, n in results["warnings"].items()]
    lines += [f"{results['counts'][n]} {t}" for n, t in _COUNTS.items() if results["counts"][n]]
    return lines


def render(results: Results) -> str:
    """The Markdown report."""
    settings = results["settings"]
    lines = [
        f"# lm-eval: {results['model']}",
        "",
        *(f"- Data of {task}: {source}" for task, source in results["data"].items()),
        f"- Weights {results['weights'][:16]}, rwkvx {results['version']}, "
        f"lm-eval {settings['lm_eval']}, {settings['dtype']}",
    ]
    limit = settings["limit"]
    if limit is not None:
        part = f"{limit:.0f} items" if limit >= 1 else f"{100 * limit:g} % of the items"
        lines.append(f"- Only the first {part} of each task")
    if settings["samples"] is not None:
        lines.append("- Only the items that --samples names")
    for name in ("system_instruction", "gen_kwargs", "chat", "truncate"):
        if settings[name]:
            lines.append(f"- {name}: {settings[name]}")
    lines += [f"- {line}" for line in remarks(results)]
    lines += [
        "",
        "![scores](scores.png)",
        "",
        "| task | shots | metric | value | standard error | items |",
        "|---|---:|---|---:|---:|---:|",
    ]
    for row in results["table"]:
        name = row["metric"] + ("" if row["filter"] == "none" else f" ({row['filter']})")
        lines.append(
            f"| {row['task']} | {row['shots']} | {name} | {_figure(row['value'])} | "
            f"{uncertainty(row).removeprefix('± ') or 'n/a'} | {row['n']} |"
        )
    lines += ["", "| task | requests asked | scored | failed |", "|---|---:|---:|---:|"]
    for task, counts in results["requests"].items():
        failed = str(counts["failed"])
        if counts["failed"]:
            failed += f" ({counts['oom']} out of memory, {counts['invalid']} not a number)"
        lines.append(f"| {task} | {counts['asked']} | {counts['scored']} | {failed} |")
    return "\n".join(lines) + "\n"
