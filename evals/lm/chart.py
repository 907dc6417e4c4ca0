"""The picture of an lm-eval run: accuracies with error bars, and the level of chance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rwkvx_evals.lm.report import SHARES

BAR, LINE = "#3b6ea5", "#b35900"
MOST_BARS = 40


def draw_chart(results: dict[str, Any], path: Path) -> None:
    """Draws one bar for each accuracy metric as a PNG; other metrics are listed below it.

    Where there are many, groups stand for their tasks.
    """
    shares = [row for row in results["table"] if row["metric"].startswith(SHARES)]
    alone = [row for row in shares if row["group"] or not row["in_group"]]
    rows = (alone if len(shares) > MOST_BARS else shares)[:MOST_BARS]
    others = [row for row in results["table"] if row not in shares and row["value"] is not None]
    figure = Figure(figsize=(7.0, 2.4 + 0.55 * max(1, len(rows))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, row in enumerate(rows):
        _draw_bar(axes, place, row)
    labels = [f"{r['task']}\n{r['metric']}, n = {r['n'] or 0:,}" for r in rows]
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(max(1, len(rows)) - 0.5, -0.5)
    axes.set_xlim(0, 118)
    axes.set_xticks(range(0, 101, 25))
    axes.set_xlabel("right (%), standard error or 95 % interval; upright line: chance")
    axes.spines[["top", "right"]].set_visible(False)
    notes = [f"{r['task']} {r['metric']} {r['value']:,.4g}" for r in others[:6]]
    text = "\n".join([f"lm-eval: {results['model']}", *notes])
    axes.set_title(text, loc="left", fontsize=11)
    figure.savefig(path, dpi=150)


def _draw_bar(axes: Any, place: int, row: dict[str, Any]) -> None:
    value = row["value"]
    if value is None:
        axes.text(1, place, "not scored", va="center", fontsize=10)
        return
    low, high = row["interval"] or (value - (row["stderr"] or 0), value + (row["stderr"] or 0))
    error = [[100 * max(0.0, value - low)], [100 * max(0.0, high - value)]]
    axes.barh(place, 100 * value, xerr=error, color=BAR, height=0.6, capsize=3)
    text = f"{100 * value:.1f}" + (f" ± {100 * row['stderr']:.1f}" if row["stderr"] else "")
    if row["interval"]:
        text += f" ({100 * low:.1f} to {100 * high:.1f})"
    axes.text(100 * max(value, high) + 1.2, place, text, va="center", fontsize=10)
    if row["chance"] is not None:
        axes.plot([100 * row["chance"]] * 2, [place - 0.4, place + 0.4], color=LINE, linewidth=2)
