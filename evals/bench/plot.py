"""The picture of a CPU benchmark: tokens per second by length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

from rwkvx_evals.bench.report import threads
from rwkvx_evals.lengths import length_label

# Colour-blind safe, told apart by marker and line style as well.
STYLES = {
    "floor": ("#777777", "s", "--"),
    "ours": ("#0072b2", "o", "-"),
    "peer": ("#d55e00", "^", "-"),
}


def draw_speed(results: dict[str, Any], path: Path) -> None:
    """Draws prefill, and decoding where it was measured, as a PNG with logarithmic axes.

    Lines are medians, bands reach from the smallest to the largest.
    """
    panels = [("Prefill", "prompt length (tokens)", "tokens", results["prefill"])]
    if "decode" in results:
        panels.append(("Decoding", "tokens read before", "after_tokens", results["decode"]))
    figure = Figure(figsize=(6.4 * len(panels), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (title, label, key, entries) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), place + 1)
        _panel(axes, entries, key, _labels(results, title))
        axes.set_title(title, loc="left", fontsize=12)
        axes.set_xlabel(label)
        axes.set_ylabel("tokens per second")
    machine, settings = results["machine"], results["settings"]
    figure.suptitle(
        f"{results['model']['name']}, {settings['dtype']}: {machine['cpu']}, "
        f"{threads(machine['threads'])}",
        x=0.01, ha="left", fontsize=11,
    )  # fmt: skip
    figure.savefig(path, dpi=150)


def _labels(results: dict[str, Any], title: str) -> dict[str, str]:
    floor = "its matrix products alone" if title == "Prefill" else "reading its weights once"
    return {"floor": f"floor: {floor}", "ours": "rwkvx", "peer": results["peer"]["words"]}


def _panel(axes: Any, entries: list[dict[str, Any]], key: str, labels: dict[str, str]) -> None:
    lengths = [entry[key] for entry in entries]
    for name, (colour, marker, line) in STYLES.items():
        speeds = [entry["tokens_per_second"].get(name) for entry in entries]
        if any(speed is None for speed in speeds):
            continue
        axes.plot(
            lengths, [s["median"] for s in speeds], line, marker=marker, color=colour,
            label=labels[name], linewidth=2, markersize=6,
        )  # fmt: skip
        low, high = [s["min"] for s in speeds], [s["max"] for s in speeds]
        axes.fill_between(lengths, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.annotate(
            f"{speeds[-1]['median']:,.0f}", (lengths[-1], speeds[-1]["median"]),
            textcoords="offset points", xytext=(7, 0), va="center", fontsize=9, color=colour,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: length_label(round(x))))
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}" if y >= 1 else f"{y:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(which="major", color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12, y=0.12)
    # Below the axes, where no line can be; one below the other, as a peer's name may be long.
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(-0.02, -0.15))
