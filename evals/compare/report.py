"""Table and picture of a comparison: HTML, Markdown, PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rwkvx_evals.compare.pairs import Run
from rwkvx_evals.files import write_atomically, write_text
from rwkvx_evals.lengths import length_label
from rwkvx_evals.long.loss import NAME
from rwkvx_evals.long.report.charts import label, line, picture
from rwkvx_evals.long.report.words import fill
from rwkvx_evals.statistics import Z

Difference = dict[str, Any]
CLEAR, UNCLEAR = "#0b6e69", "#8a94a3"


def gain(row: Difference) -> str:
    """+4.0 ± 1.5 points of a score, -0.0120 ± 0.0031 nats of a loss."""
    if row["task"] == NAME:
        error = "" if row["stderr"] is None else f" ± {row['stderr']:.4f}"
        return f"{row['difference']:+.4f}{error}"
    return f"{100 * row['difference']:+.1f} ± {100 * row['stderr']:.1f}"


def side(row: Difference, which: str) -> str:
    """One run's mean: percent, or nats."""
    return f"{row[which]:.4f}" if row["task"] == NAME else f"{100 * row[which]:.1f} %"


def write_comparison(runs: Sequence[Run], parts: Sequence[list[Difference]], out: Path) -> None:
    """parts: of each run but the first, its differences from the first."""
    write_atomically(out / "compare.png", lambda path: draw(runs, parts, path))
    write_text(out / "compare.md", render_markdown(runs, parts))
    shown = [
        {
            "label": run.label,
            "rows": rows,
            "all_paired": all(row["paired"] for row in rows),
            "chart": _chart(rows, f"{run.label} minus {runs[0].label}"),
        }
        for run, rows in zip(runs[1:], parts, strict=True)
    ]
    page = fill(
        "compare.html.j2", Path(__file__).parent, runs=runs, base=runs[0], parts=shown,
        filters={"gain": gain, "side": side},
    )  # fmt: skip
    write_text(out / "compare.html", page)


def render_markdown(runs: Sequence[Run], parts: Sequence[list[Difference]]) -> str:
    """One table for each run but the first."""
    lines = ["# " + " · ".join(run.label for run in runs), "", "![differences](compare.png)"]
    for run, rows in zip(runs[1:], parts, strict=True):
        lines += [
            "",
            f"## {run.label} minus {runs[0].label}",
            "",
            f"| task | length | samples | {runs[0].label} | {run.label} | difference | certain |",
            "|---|---:|---:|---:|---:|---:|---|",
        ]
        for row in rows:
            length = f"{row['length']:,}" if row["length"] else "all"
            count = f"{row['n']}" if row["paired"] else f"{row['n']} (unpaired)"
            lines.append(
                f"| {row['task']} | {length} | {count} | {side(row, 'a')} | {side(row, 'b')} | "
                f"{gain(row)} | {'yes' if row['significant'] else ''} |"
            )
    note = (
        "Differences with one standard error, in points of percent (loss: nats); certain: 0 lies "
        "outside of the 95 % interval. A failed sample counts 0."
    )
    lines += ["", note, ""]
    lines += [f"- {run.label}: {run.folder}, weights {run.results['weights'][:16]}" for run in runs]
    return "\n".join(lines) + "\n"


def _scores(rows: Sequence[Difference]) -> list[Difference]:
    return [row for row in rows if row["task"] != NAME]


def _name(row: Difference) -> str:
    return f"{row['task']} {length_label(row['length'])}" if row["length"] else str(row["task"])


def _chart(rows: Sequence[Difference], name: str) -> Markup | str:
    """Differences of scores, one below the other, with 95 % intervals."""
    shown = _scores(rows)
    if not shown:
        return ""
    reach = max(abs(row["difference"]) + Z * row["stderr"] for row in shown)
    reach = min(1.0, 1.05 * reach)
    width, left, right, step = 520.0, 170.0, 14.0, 19.0
    height = step * len(shown) + 34
    middle = (left + width - right) / 2

    def x(value: float) -> float:
        return middle + max(-1.0, min(1.0, value / reach)) * (width - right - left) / 2

    parts = [line(x(v), 6, x(v), height - 26, "rule") for v in (-reach, reach)]
    parts.append(line(x(0), 6, x(0), height - 26, "threshold"))
    for value in (-reach, 0, reach):
        parts.append(label(x(value), height - 10, f"{100 * value:+.0f}" if value else "0"))
    for number, row in enumerate(shown):
        y = 18 + step * number
        kind = "s1" if row["significant"] else "s6"
        parts.append(label(left - 8, y + 4, Markup.escape(_name(row)), "end"))
        ends = [x(row["difference"] + s * Z * row["stderr"]) for s in (-1, 1)]
        parts.append(
            f'<line style="stroke:var(--{kind})" stroke-width="2" x1="{ends[0]:.1f}" '
            f'x2="{ends[1]:.1f}" y1="{y}" y2="{y}"/><circle style="fill:var(--{kind})" '
            f'cx="{x(row["difference"]):.1f}" cy="{y}" r="4"/>'
        )
    return picture(width, height, parts, name)


def draw(runs: Sequence[Run], parts: Sequence[list[Difference]], path: Path) -> None:
    """The same as PNG, the runs side by side."""
    longest = max(len(_scores(rows)) for rows in parts)
    size = (2.6 + 3.6 * len(parts), 1.6 + 0.27 * max(3, longest))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(parts), squeeze=False)[0]
    for place, run, rows in zip(axes, runs[1:], parts, strict=True):
        shown = _scores(rows)
        for number, row in enumerate(shown):
            colour = CLEAR if row["significant"] else UNCLEAR
            error = 100 * Z * row["stderr"]
            place.errorbar(100 * row["difference"], number, xerr=error, fmt="o", color=colour,
                           markersize=5, capsize=3)  # fmt: skip
        place.axvline(0, color="#333333", linewidth=1)
        place.set_yticks(range(len(shown)), [_name(row) for row in shown], fontsize=8)
        place.set_ylim(max(len(shown), 1) - 0.5, -0.5)
        place.set_xlabel("points of percent, 95 % interval")
        place.spines[["top", "right"]].set_visible(False)
        place.grid(axis="x", alpha=0.25)
        place.set_title(f"{run.label}\nminus {runs[0].label}", fontsize=9, loc="left")
    figure.savefig(path, dpi=150)


def summary(runs: Sequence[Run], parts: Sequence[list[Difference]]) -> str:
    """The table for the terminal."""
    lines = []
    for run, rows in zip(runs[1:], parts, strict=True):
        lines.append(f"{run.label} minus {runs[0].label}:")
        for row in rows:
            mark = "  significant" if row["significant"] else ""
            lines.append(f"  {_name(row):<28} {gain(row):>16}  n = {row['n']}{mark}")
    return "\n".join(lines)
