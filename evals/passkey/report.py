"""Results, tables and files of a passkey run; nothing here depends on the time it took."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rwkvx.data.passkey import Filler, draw_key
from rwkvx_evals.files import package_version, write_atomically, write_json, write_text
from rwkvx_evals.journal import Row
from rwkvx_evals.lengths import length_label
from rwkvx_evals.long.plan import Plan, Question
from rwkvx_evals.long.results import write_rows
from rwkvx_evals.passkey.heatmap import draw_heatmap
from rwkvx_evals.passkey.plan import Settings
from rwkvx_evals.statistics import effective_length, tally

Results = dict[str, Any]
MISSES_SHOWN = 20


def as_row(settings: Settings, question: Question, row: Row) -> Row:
    """A row of samples.jsonl, from what was asked and the engine's row of the answer."""
    correct = row["status"] == "ok" and row["score"] == 1.0
    depth, seed = settings.place(question.index)
    return {
        "length": question.length,
        "depth": round(depth, 6),
        "seed": seed,
        "passkey": draw_key(seed, question.length, depth),
        "status": row["status"],
        "correct": correct,
        "answer": row["answer"],
        "tokens": row["tokens"],
        "key": question.key,
    }


def sort_rows(rows: Iterable[Row]) -> list[Row]:
    """By length, depth and seed."""
    return sorted(rows, key=lambda row: (row["length"], row["depth"], row["seed"]))


def collect(
    settings: Settings, filler: Filler, plan: Plan, rows: Sequence[Row], *, model: str
) -> Results:
    """Everything a report says, from the rows of a finished plan."""
    cells, lengths = [], []
    for length in settings.lengths:
        found = [row for row in rows if row["length"] == length]
        for depth in (round(depth, 6) for depth in settings.depths):
            cell = tally([row for row in found if row["depth"] == depth])
            cells.append({"length": length, "depth": depth, **cell})
        lengths.append({"length": length, **tally(found)})
    curve = [(entry["length"], entry["accuracy"]) for entry in lengths]
    return {
        "task": "passkey",
        "model": model,
        "weights": plan.target.weights,
        "version": package_version(),
        "filler": filler.name,
        "filler_tokens": filler.natural_length,
        "seeds": settings.seeds,
        "depths": [round(depth, 6) for depth in settings.depths],
        "max_new_tokens": settings.max_new_tokens,
        "dtype": settings.dtype,
        "prompt_tokens": {"read": plan.tokens_shared(), "without_sharing": plan.tokens_alone()},
        "total": tally(rows),
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
    """Writes samples.jsonl, results.json, report.md and heatmap.png, each whole or not at all."""
    write_rows(rows, folder / "samples.jsonl")
    write_json(folder / "results.json", results)
    write_atomically(folder / "heatmap.png", lambda path: draw_heatmap(results, path))
    write_text(folder / "report.md", render(results, rows))
