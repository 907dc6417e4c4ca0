"""The report of a run as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rwkvx_evals.lengths import length_label
from rwkvx_evals.long.loss import NAME
from rwkvx_evals.long.report.page import facts, misses
from rwkvx_evals.long.report.words import duration, percent, plus_minus, size

MISSES_SHOWN = 20


def render_markdown(results: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """rows: of samples.jsonl."""
    total, tokens = results["total"], results["prompt_tokens"]
    lines = [
        f"# Long context: {results['model']}",
        "",
        f"- {total['asked']:,} samples asked, {total['scored']:,} scored, {total['failed']:,} "
        f"failed ({total['oom']} out of memory, {total['invalid']} not a number, "
        f"{total['error']} without an answer), {total['skipped']:,} skipped, "
        f"{total['truncated']:,} truncated",
        f"- {tokens['read']:,} prompt tokens with shared prefixes, {tokens['without_sharing']:,} "
        "without",
        *(f"- Warning: {text}" for text in results["warnings"]),
    ]
    if results["tasks"]:
        lines += ["", "![scores](scores.png)", "", *_scores(results), "", *_counts(results)]
    if NAME in results:
        lines += ["", "![loss by position](loss.png)", "", *_loss(results[NAME])]
    lines += ["", *_cost(results), "", *_misses(rows), "", "## How it was run", ""]
    lines += [f"- {name}: {value}" for name, value in facts(results)]
    return "\n".join(lines) + "\n"


def _scores(results: dict[str, Any]) -> list[str]:
    lengths = results["lengths"]
    lines = [
        "Score with its 95 % Wilson interval; effective is the longest length that keeps 85 % "
        "of the score at the shortest.",
        "",
        "| task | " + " | ".join(length_label(n) for n in lengths) + " | effective |",
        "|---|" + "---:|" * (len(lengths) + 1),
    ]
    for name, task in results["tasks"].items():
        cells = [_cell(task["lengths"].get(str(n))) for n in lengths]
        effective = task["effective_length"]
        shown = length_label(effective) if effective else "none"
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {shown} |")
    return lines


def _cell(entry: dict[str, Any] | None) -> str:
    if entry is None or entry["score"] is None:
        return "–"
    star = "*" if entry["failed"] else ""
    return f"{percent(entry['score'])}{star} ({100 * entry['low']:.0f}–{100 * entry['high']:.0f})"


def _counts(results: dict[str, Any]) -> list[str]:
    lines = [
        "| task | length | asked | scored | failed | skipped | score | standard error |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, task in results["tasks"].items():
        for length, e in task["lengths"].items():
            lines.append(
                f"| {name} | {int(length):,} | {e['asked']} | {e['scored']} | {e['failed']} | "
                f"{e['skipped']} | {percent(e['score'])} | {percent(e['stderr'])} |"
            )
    return lines


def _loss(found: dict[str, Any]) -> list[str]:
    lines = [
        f"Loss in nats. LongPPL (arXiv 2410.23771): gain above {found['alpha']} nats over windows "
        f"of {found['short_window']} tokens whose last {found['stride']} are scored, "
        f"log-probability above {found['beta']}; the model itself is the judge.",
        "",
        "| length | windows | loss | LongPPL | key tokens | failed | skipped |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for length, e in found["lengths"].items():
        lines.append(
            f"| {int(length):,} | {e['windows']} | {plus_minus(e['loss'], e['stderr'])} | "
            f"{plus_minus(e['long_ppl'], e['long_ppl_stderr'])} | {e['key_tokens']:,} of "
            f"{e['compared']:,} | {e['failed']} | {e['skipped']} |"
        )
    longest: list[Any] = max((e["buckets"] for e in found["lengths"].values()), key=len)
    lines += ["", "| tokens before | loss |", "|---:|---:|"]
    for b in longest:
        shown = plus_minus(b["loss"], b["stderr"])
        lines.append(f"| {b['from']:,} to {b['to'] - 1:,} | {shown} |")
    return lines


def _cost(results: dict[str, Any]) -> list[str]:
    lines = [
        "| length | time | tokens read | tokens/s | generated | peak memory |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for length, e in results["timing"].items():
        speed = f"{e['tokens_per_second']:,.0f}" if e["tokens_per_second"] else "–"
        lines.append(
            f"| {int(length):,} | {duration(e['seconds'])} | {e['read']:,} | {speed} | "
            f"{e['generated']:,} | {size(e['peak_bytes'])} |"
        )
    return lines


def _misses(rows: Sequence[dict[str, Any]]) -> list[str]:
    found = [row for group in misses(rows) for row in group["rows"]]
    if not found:
        return ["Every sample that was asked was answered rightly."] if rows else []
    lines = [
        f"Wrong or failed: {len(found):,}; the first {min(len(found), MISSES_SHOWN)} are here, all "
        "are in report.html and samples.jsonl.",
        "",
        "| sample | status | score | expected | answer |",
        "|---|---|---:|---|---|",
    ]
    for row in found[:MISSES_SHOWN]:
        expected = _quoted(", ".join(row["expected"]))
        lines.append(
            f"| {row['id']} | {row['status']} | {row['score']:.2f} | {expected} | "
            f"{_quoted(row['answer'] or row.get('reason', ''))} |"
        )
    return lines


def _quoted(text: str) -> str:
    """On one line, short, and no Markdown."""
    short = repr(text[:80] + ("…" if len(text) > 80 else ""))
    return "`" + short.replace("|", "\\|").replace("`", "'") + "`"
