"""PNG pictures of a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rwkvx_evals.lengths import length_label

# A sequential map that keeps its order in grey and for colour-blind readers.
COLOURS = "cividis"


def draw_scores(results: dict[str, Any], path: Path) -> None:
    """Score by task and length with its interval; a star marks cells with failures."""
    tasks, lengths = results["tasks"], results["lengths"]
    entries = [[task["lengths"].get(str(n)) for n in lengths] for task in tasks.values()]
    values = np.array([[math.nan if e is None or e["score"] is None else e["score"] for e in row]
                       for row in entries])  # fmt: skip
    figure = Figure(
        figsize=(3.6 + 1.15 * len(lengths), 1.7 + 0.5 * len(tasks)), layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(values, cmap=COLOURS, vmin=0.0, vmax=1.0, aspect="auto")
    for row, found in enumerate(entries):
        for column, entry in enumerate(found):
            if entry is None or entry["score"] is None:
                axes.text(column, row, "–", ha="center", va="center", color="#777777")
                continue
            star = "*" if entry["failed"] else ""
            text = f"{100 * entry['score']:.0f}{star}\n"
            colour = "black" if entry["score"] > 0.55 else "white"
            axes.text(column, row + 0.1, text, ha="center", va="center", fontsize=11, color=colour)
            interval = f"{100 * entry['low']:.0f}–{100 * entry['high']:.0f}"
            axes.text(column, row + 0.27, interval, ha="center", va="center", fontsize=7.5,
                      color=colour)  # fmt: skip
    axes.set_xticks(range(len(lengths)), [length_label(n) for n in lengths])
    axes.set_yticks(range(len(tasks)), list(tasks))
    axes.set_xlabel("tokens")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for edge in np.arange(1, len(lengths)) - 0.5:
        axes.axvline(edge, color="white", linewidth=2)
    for edge in np.arange(1, len(tasks)) - 0.5:
        axes.axhline(edge, color="white", linewidth=2)
    total = results["total"]
    note = f"percent right, 95 % interval; {total['asked']:,} samples"
    note += f", * {total['failed']:,} failed" if total["failed"] else ""
    axes.set_title(f"{results['model']}\n{note}", fontsize=10, loc="left")
    figure.savefig(path, dpi=150)


def draw_loss(results: dict[str, Any], found: dict[str, Any], path: Path) -> None:
    """Loss by position, a curve for each length, with one standard error."""
    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for length, entry in found["lengths"].items():
        buckets = entry["buckets"]
        if not buckets:
            continue
        places = [math.sqrt(b["from"] * b["to"]) for b in buckets]
        mean = np.array([b["loss"] for b in buckets])
        error = np.array([b["stderr"] or 0.0 for b in buckets])
        name = f"{length_label(int(length))}, {entry['windows']} windows"
        (drawn,) = axes.plot(places, mean, marker="o", markersize=3, label=name)
        axes.fill_between(places, mean - error, mean + error, alpha=0.2, color=drawn.get_color())
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens before")
    axes.set_ylabel("loss (nats)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    axes.set_title(f"Loss by position: {results['model']}", loc="left", fontsize=11)
    figure.savefig(path, dpi=150)
