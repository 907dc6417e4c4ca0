"""The picture of an lm-eval run: accuracies with error bars, and the level of chance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# The share of right answers by guessing; LAMBADA's last word has no finite set of choices.
CHANCE = {"piqa": 0.5}
BAR, LINE = "#3b6ea5", "#b35900"


def draw_chart(results: dict[str, Any], path: Path) -> None:
    """Draws one bar for each accuracy metric as a PNG; other metrics are listed below it."""
    rows = [row for row in results["table"] if row["metric"].startswith(("acc", "exact"))]
    others = [row for row in results["table"] if row not in rows and row["value"] is not None]
    figure = Figure(figsize=(7.0, 1.9 + 0.55 * max(1, len(rows))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, row in enumerate(rows):
        value, error = row["value"], row["stderr"] or 0.0
        if value is None:
            axes.text(1, place, "not scored", va="center", fontsize=10)
            continue
        axes.barh(place, 100 * value, xerr=100 * error, color=BAR, height=0.6, capsize=3)
        label = f"{100 * value:.1f} ± {100 * error:.1f}"
        axes.text(100 * (value + error) + 1.2, place, label, va="center", fontsize=10)
        chance = CHANCE.get(row["task"])
        if chance is not None:
            axes.plot([100 * chance] * 2, [place - 0.4, place + 0.4], color=LINE, linewidth=2)
    axes.set_yticks(range(len(rows)), [f"{r['task']}\n{r['metric']}, n = {r['n']:,}" for r in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 110)
    axes.set_xticks(range(0, 101, 25))
    axes.set_xlabel("right (%), with standard error; the upright line is chance")
    axes.spines[["top", "right"]].set_visible(False)
    note = "   ".join(f"{r['task']} {r['metric']} {r['value']:,.4g}" for r in others)
    title = f"lm-eval: {results['model']}"
    axes.set_title(f"{title}\n{note}" if note else title, loc="left", fontsize=11)
    figure.savefig(path, dpi=150)
