"""Results, tables and files of a passkey run; nothing here depends on the time it took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rwkvx_evals.files import package_version, write_atomically, write_json, write_text
from rwkvx_evals.journal import Row
from rwkvx_evals.passkey.heatmap import draw_heatmap
from rwkvx_evals.passkey.plan import Plan, length_label
from rwkvx_evals.statistics import effective_length, tally

Results = dict[str, Any]
MISSES_SHOWN = 20


def collect(plan: Plan, rows: Mapping[str, Row], *, model: str, weights: str) -> Results:
    """Everything a report says, from the journal rows of a finished plan."""
    settings = plan.settings
    cells, lengths = [], []
    for length, groups in plan.groups.items():
        by_depth = [(g.depth, [rows[sample.key] for sample in g.samples]) for g in groups]
        cells += [
            {"length": length, "depth": round(depth, 6), **tally(found)}
            for depth, found in by_depth
        ]
        lengths.append({"length": length, **tally([row for _, f in by_depth for row in f])})
    curve = [(entry["length"], entry["accuracy"]) for entry in lengths]
    naive, shared = plan.naive_tokens(), plan.shared_tokens()
    return {
        "task": "passkey",
        "model": model,
        "weights": weights,
        "version": package_version(),
        "filler": plan.filler.name,
        "filler_tokens": plan.filler.natural_length,
        "seeds": settings.seeds,
        "depths": [round(depth, 6) for depth in settings.depths],
        "max_new_tokens": settings.max_new_tokens,
        "dtype": settings.dtype,
        "prompt_tokens": {"read": shared, "without_sharing": naive},
        "total": tally([rows[sample.key] for sample in plan.samples]),
        "effective_length": effective_length(curve),
        "lengths": lengths,
        "cells": cells,
    }


def percent(share: float, digits: int = 1) -> str:
    """0.5 → "50.0 %"."""
    return f"{100 * share:.{digits}f} %"


def uncertainty(entry: Mapping[str, Any]) -> str:
    """The standard error of an accuracy, or where all or none are right, its 95 % interval."""
    if entry["stderr"] is not None:
        return f"± {percent(entry['stderr'])}"
    low, high = entry["interval"]
    return f"{percent(low)} to {percent(high)} (95 %)"


def render(results: Results, rows: Sequence[Row]) -> str:
    """The Markdown report."""
    tokens = results["prompt_tokens"]
    ratio = tokens["without_sharing"] / tokens["read"]
    effective = results["effective_length"]
    lines = [
        f"# Passkey retrieval: {results['model']}",
        "",
        f"- Filler: {_filler_words(results)}",
        f"- {len(results['depths'])} depths × {results['seeds']} seeds per length, greedy, exact "
        f"match, lengths in tokens, at most {results['max_new_tokens']} new tokens, "
        f"{results['dtype']}",
        f"- Effective length (accuracy stays at 85 % or more of that at "
        f"{length_label(results['lengths'][0]['length'])}): "
        f"{'none' if effective is None else f'{effective:,} tokens'}",
        f"- Prompt tokens: {tokens['read']:,} with shared prefixes, {tokens['without_sharing']:,} "
        f"without ({ratio:.2f} times as many)",
        f"- Weights {results['weights'][:16]}, rwkvx {results['version']}",
        "",
        "![accuracy by length and depth](heatmap.png)",
        "",
        "| length | asked | scored | failed | right | accuracy | standard error |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, entry in [
        *((f"{e['length']:,}", e) for e in results["lengths"]),
        ("all", results["total"]),
    ]:
        lines.append(
            f"| {name} | {entry['asked']} | {entry['scored']} | {entry['failed']} | "
            f"{entry['correct']} | {percent(entry['accuracy'])} | {uncertainty(entry)} |"
        )
    lines += ["", *_depth_table(results), "", *_misses(rows)]
    return "\n".join(lines) + "\n"


def _filler_words(results: Results) -> str:
    if results["filler"] == "standard":
        return "the standard sentences, repeated"
    own, longest = results["filler_tokens"], results["lengths"][-1]["length"]
    repeats = (
        f"; longer prompts repeat it (the longest here is {longest:,})" if longest > own else ""
    )
    return f"{results['filler']}, {own:,} tokens{repeats}"


def _depth_table(results: Results) -> list[str]:
    lengths = [entry["length"] for entry in results["lengths"]]
    lines = [
        "Right answers of those asked, by depth (0 % is the start of the prompt):",
        "",
        "| depth | " + " | ".join(length_label(length) for length in lengths) + " |",
        "|---:|" + "---:|" * len(lengths),
    ]
    found = {(c["length"], c["depth"]): f"{c['correct']}/{c['asked']}" for c in results["cells"]}
    for depth in results["depths"]:
        row = " | ".join(found[length, depth] for length in lengths)
        lines.append(f"| {percent(depth, 0)} | {row} |")
    return lines


def _misses(rows: Sequence[Row]) -> list[str]:
    missed = [row for row in rows if not row["correct"]]
    if not missed:
        return ["Every sample was answered rightly."]
    lines = [
        f"Missed {len(missed)} (the first {min(len(missed), MISSES_SHOWN)} are shown, all are in "
        "`samples.jsonl`):",
        "",
        "| length | depth | seed | key | status | answer |",
        "|---:|---:|---:|---:|---|---|",
    ]
    for row in missed[:MISSES_SHOWN]:
        answer = repr(row["answer"]).replace("|", "\\|").replace("`", "'")
        lines.append(
            f"| {row['length']:,} | {percent(row['depth'], 0)} | {row['seed']} | "
            f"{row['passkey']} | {row['status']} | `{answer}` |"
        )
    return lines


def write_report(results: Results, rows: Sequence[Row], folder: Path) -> None:
    """Writes results.json, report.md and heatmap.png, each whole or not at all."""
    write_json(folder / "results.json", results)
    write_atomically(folder / "heatmap.png", lambda path: draw_heatmap(results, path))
    write_text(folder / "report.md", render(results, rows))
