"""The tables of a kernel benchmark."""

from __future__ import annotations

from statistics import median
from typing import Any

from rwkvx_evals.bench.kernels import models
from rwkvx_evals.bench.kernels.case import OURS
from rwkvx_evals.bench.timing import spread

Row = dict[str, Any]


def render(results: dict[str, Any]) -> str:
    """The report in Markdown, from the results alone."""
    shown = pictures(results["cases"])
    kernels, whole = shown.get("kernels", []), shown.get("models", [])
    measured = kernels + whole
    parts = [_head(results), _summary(results["summary"])]
    if kernels:
        parts += ["## Kernels", "![time per token by length](kernels.png)"]
        parts.append(_kernels(kernels))
    if whole:
        parts += ["## Whole models", "![time per token by length](models.png)"]
        parts.append(_models(whole, results["energy"]))
    others = [row for row in results["cases"] if row["status"] != "measured"]
    if others or any(row["left_out"] for row in measured):
        parts += ["## Not measured", _missing(others, measured)]
    return "\n\n".join(parts) + "\n"


def pictures(rows: list[Row]) -> dict[str, list[Row]]:
    """The measured rows by the picture that shows them; no picture without rows."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["status"] == "measured":
            name = "models" if row["family"] in models.PLANS else "kernels"
            found.setdefault(name, []).append(row)
    return found


def line(row: Row) -> str:
    """A row for the terminal."""
    name = f"{row['family']}, {row['tokens']:,} tokens"
    if row["status"] != "measured":
        return f"{name}: {row['status'].upper()}: {row['reason']}"
    text = (
        f"{name}: {_milliseconds(row['seconds'][OURS])} ms, {row['times_floor']:.1f} times its "
        f"floor, error {row['errors'][OURS]:.1e}"
    )
    for peer, times in row["faster_than"].items():
        text += f", {times['median']:.2f} times as fast as {peer}"
    if row["joules_per_token"]:
        text += f", {1e3 * row['joules_per_token'][OURS]:.3g} mJ per token"
    return text


def between(values: dict[str, float], unit: str = "") -> str:
    """Median (smallest … largest); the median alone where all are one."""
    middle, low, high = (_number(values[name]) for name in ("median", "min", "max"))
    return f"{middle}{unit}" if low == high else f"{middle}{unit} ({low} … {high})"


def _number(x: float) -> str:
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"


def _milliseconds(seconds: list[float]) -> str:
    return between(spread([1e3 * x for x in seconds]))


def _head(results: dict[str, Any]) -> str:
    machine, budget = results["machine"], results["budget_seconds"]
    versions = ", ".join(
        f"{name} {machine[name] or 'not installed'}"
        for name in ("torch", "triton", "fla-core", "flash-attn")
    )
    ceilings = "; ".join(f"{name} {x:,.0f}" for name, x in results["ceilings"].items())
    return "\n".join(
        [
            "# Kernels",
            "",
            f"- Machine: {machine['gpu'] or 'no GPU: ' + machine['cpu']}, {versions}",
            f"- Commit {machine['commit'] or 'unknown'}, {machine['date']}; made by `rwkvx bench "
            f"kernels` in {results['seconds']:.0f} s (budget {budget:.0f} s)",
            f"- Ceilings measured first: {ceilings}",
            f"- Energy: {results['energy']}",
            "- Batch 1, 16 heads of 64 channels, bfloat16 (WKV7: log decays in float32); chunks of "
            "128 tokens, 8 of them read. Errors are relative to float64 and come before any "
            "timing. Cells are median (smallest … largest) of repeats by turns (ours, peer, ours, "
            "peer, …); a ratio is taken within each turn.",
            "- A floor is the time in which a copy moves the bytes that no implementation can "
            "avoid, or in which one matrix product does the same arithmetic, whichever is longer.",
        ]
    )


def _summary(lines: list[dict[str, Any]]) -> str:
    rows = []
    for entry in lines:
        found = entry["measured"]
        said = {None: "not measured", True: "yes", False: "no"}[entry["reached"]]
        text = "–" if found is None else between(found, entry["unit"])
        rows.append([entry["what"], entry["wanted"], text, said])
    return "## Summary\n\n" + _table(["what", "wanted", "measured", "reached?"], rows)


def _kernels(rows: list[Row]) -> str:
    header = ["operation", "tokens", "ms", "× floor", "of the floor", "TFLOP/s", "error"]
    header += ["extra MiB", "over in + out", "peer: ms (error), ours times as fast"]
    cells = []
    for row in _by_family(rows):
        floors, extra = row["floor_seconds"], row["extra_bytes"]
        over = row["over_inputs_and_outputs"]
        peers = "; ".join(
            f"{n}: {_milliseconds(row['seconds'][n])} ({row['errors'][n]:.1e}), {between(x)}"
            for n, x in row["faster_than"].items()
        )
        cells.append(
            [
                row["family"],
                f"{row['tokens']:,}",
                _milliseconds(row["seconds"][OURS]),
                f"{row['times_floor']:.2f} ({max(floors, key=lambda name: floors[name])})",
                f"{1 / row['times_floor']:.0%}",
                _number(1e-12 * row["flops"] / median(row["seconds"][OURS])),
                f"{row['errors'][OURS]:.1e}",
                "–" if extra is None else f"{extra / 2**20:,.0f}",
                "–" if over is None else f"{over:.2f}",
                peers or "–",
            ]
        )
    return _table(header, cells)


def _models(rows: list[Row], energy: str) -> str:
    header = ["what", "tokens", "model", "tokens/s", "ms per token", "× floor", "error"]
    header.append("mJ per token")
    cells = []
    for row in _by_family(rows):
        units = row["units"]
        for name, seconds in row["seconds"].items():
            joules = row["joules_per_token"].get(name)
            cells.append(
                [
                    row["family"],
                    f"{row['tokens']:,}",
                    "hybrid" if name == OURS else name,
                    between(spread([units / x for x in seconds])),
                    _milliseconds([x / units for x in seconds]),
                    f"{row['times_floor']:.1f}" if name == OURS else "–",
                    f"{row['errors'][name]:.1e}",
                    "–" if joules is None else f"{1e3 * joules:.3g}",
                ]
            )
    note = (
        "Prefill reads so many tokens at once; decoding goes on, token by token, from a context "
        "of so many (random keys and values in the place of a text). The dense Transformer has "
        "the width, depth, heads and feed-forward of the hybrid; it decodes "
        "without a CUDA graph. Energy is that of the whole GPU, "
        f"idle power included ({energy})."
    )
    return f"{_table(header, cells)}\n\n{note}"


def _missing(others: list[Row], measured: list[Row]) -> str:
    cells = [[r["family"], f"{r['tokens']:,}", r["status"], r["reason"]] for r in others]
    for row in measured:
        for name, why in row["left_out"].items():
            cells.append([f"{row['family']}: {name}", f"{row['tokens']:,}", "left out", why])
    return _table(["what", "tokens", "", "why"], [[c.replace("|", "/") for c in x] for x in cells])


def _by_family(rows: list[Row]) -> list[Row]:
    """Families as they came, lengths rising."""
    order = list(dict.fromkeys(row["family"] for row in rows))
    return sorted(rows, key=lambda row: (order.index(row["family"]), row["tokens"]))


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
