"""The length × depth picture of a passkey run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rwkvx_evals.lengths import length_label

# A sequential map that keeps its order in grey and for colour-blind readers.
COLOURS = "cividis"


def draw_heatmap(results: dict[str, Any], path: Path) -> None:
    """Draws accuracy by length and depth as a PNG, with the value in each cell.

    A cell with samples that failed (out of memory, not-a-number) is marked with a star.
    """
    lengths = [entry["length"] for entry in results["lengths"]]
    depths = results["depths"]
    cells = {(cell["length"], cell["depth"]): cell for cell in results["cells"]}
    values = np.array([[cells[n, d]["accuracy"] for n in lengths] for d in depths])

    figure = Figure(
        figsize=(3.2 + 1.0 * len(lengths), 2.3 + 0.42 * len(depths)), layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(values, cmap=COLOURS, vmin=0.0, vmax=1.0, aspect="auto")
    for row, depth in enumerate(depths):
        for column, length in enumerate(lengths):
            value = values[row, column]
            star = "*" if cells[length, depth]["failed"] else ""
            axes.text(
                column, row, f"{100 * value:.0f}{star}", ha="center", va="center", fontsize=11,
                color="black" if value > 0.55 else "white",
            )  # fmt: skip
    axes.set_xticks(range(len(lengths)), [length_label(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
    axes.set_xlabel("prompt length (tokens)")
    axes.set_ylabel("depth of the key")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(len(lengths) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(depths) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    _add_title(axes, results)
    bar = figure.colorbar(image, ax=axes, ticks=[0, 0.25, 0.5, 0.75, 1.0], shrink=0.9)
    bar.ax.set_yticklabels(["0", "25", "50", "75", "100"])
    bar.set_label("right answers (%)")
    bar.outline.set_visible(False)
    figure.savefig(path, dpi=150)


def _add_title(axes: Any, results: dict[str, Any]) -> None:
    total = results["total"]
    note = f"{results['seeds']} samples per cell, {total['correct']} of {total['asked']} right"
    if total["failed"]:
        note += f", * {total['failed']} failed"
    axes.set_title(
        f"Passkey: {results['model']}\n{results['filler']} filler", fontsize=12, loc="left", pad=22
    )
    axes.text(0, 1.02, note, transform=axes.transAxes, fontsize=9, color="#444444")
