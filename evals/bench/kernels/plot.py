"""The pictures of a kernel benchmark."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

from rwkvx_evals.bench.kernels.case import OURS
from rwkvx_evals.lengths import length_label

# Colour-blind safe, told apart by marker and line style as well.
STYLES = [("#d55e00", "^", "-"), ("#009e73", "v", "-"), ("#cc79a7", "D", "-")]
OWN, FLOOR = ("#0072b2", "o", "-"), ("#777777", "s", "--")
COLUMNS = 4

Row = dict[str, Any]


def draw(rows: list[Row], results: dict[str, Any], path: Path) -> None:
    """Time per token by length as a PNG, a panel for each family of the measured rows.

    Lines are medians, bands reach from the smallest to the largest.
    """
    families: dict[str, list[Row]] = {}
    for row in rows:
        families.setdefault(row["family"], []).append(row)
    columns = min(COLUMNS, len(families))
    lines = -(-len(families) // columns)
    figure = Figure(figsize=(4.6 * columns, 4.3 * lines + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (family, found) in enumerate(families.items(), 1):
        axes = figure.add_subplot(lines, columns, place)
        _panel(axes, sorted(found, key=lambda row: row["tokens"]))
        axes.set_title(family, loc="left", fontsize=10.5)
        axes.set_xlabel("tokens")
    machine = results["machine"]
    figure.suptitle(
        f"{machine['gpu'] or 'no GPU: ' + machine['cpu']}, torch {machine['torch']}, triton "
        f"{machine['triton']}", x=0.01, ha="left", fontsize=11,
    )  # fmt: skip
    figure.savefig(path, dpi=130)


def _panel(axes: Any, rows: list[Row]) -> None:
    names = dict.fromkeys(name for row in rows for name in row["seconds"])
    peers = iter(STYLES)
    slow = any(median(r["seconds"][OURS]) > 1e-6 * r["units"] for r in rows)
    scale, unit = (1e6, "microseconds") if slow else (1e9, "nanoseconds")
    axes.set_ylabel(f"{unit} per token")
    labels: list[tuple[int, float]] = []
    for name in ("floor", *names):
        points = []
        for r in rows:
            floor = [max(r["floor_seconds"].values())]
            seconds = floor if name == "floor" else r["seconds"].get(name)
            if seconds:
                points.append((r["tokens"], [scale * x / r["units"] for x in seconds]))
        style = {"floor": FLOOR, OURS: OWN}.get(name) or next(peers)
        _line(axes, points, style, "rwkvx" if name == OURS else name, labels)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator([row["tokens"] for row in rows]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: length_label(round(x))))
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _number(y)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(which="major", color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.16, y=0.14)
    # Below the axes, where no line can be.
    axes.legend(
        frameon=False, fontsize=8.5, loc="upper left", bbox_to_anchor=(-0.05, -0.14), ncols=2
    )


def _number(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def _line(
    axes: Any,
    points: list[tuple[int, list[float]]],
    style: tuple[str, str, str],
    name: str,
    labels: list[tuple[int, float]],
) -> None:
    """Draws points, and the last one's number where it covers none of `labels`."""
    colour, marker, kind = style
    tokens = [n for n, _ in points]
    middle = [median(values) for _, values in points]
    axes.plot(
        tokens, middle, kind, marker=marker, color=colour, label=name, linewidth=1.8, markersize=5.5
    )
    low, high = ([f(values) for _, values in points] for f in (min, max))
    axes.fill_between(tokens, low, high, color=colour, alpha=0.18, linewidth=0)
    last = (tokens[-1], middle[-1])
    if any(n == last[0] and 0.8 < x / last[1] < 1.25 for n, x in labels):
        return
    labels.append(last)
    axes.annotate(
        _number(last[1]), last, textcoords="offset points", xytext=(6, 0), va="center", fontsize=8,
        color=colour,
    )  # fmt: skip
