"""The pictures of a kernel benchmark."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

from rwkvx_evals.bench.kernels.case import OURS
from rwkvx_evals.passkey.plan import length_label

# Colour-blind safe, told apart by marker and line style as well.
STYLES = [("#d55e00", "^", "-"), ("#009e73", "v", "-"), ("#cc79a7", "D", "-")]
OWN, FLOOR = ("#0072b2", "o", "-"), ("#777777", "s", "--")
COLUMNS = 4

Row = dict[str, Any]


def draw(rows: list[Row], results: dict[str, Any], path: Path) -> None:
    """Microseconds per token by length as a PNG, a panel for each family of the measured rows.

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
        axes.set_ylabel("microseconds per token")
    machine = results["machine"]
    figure.suptitle(
        f"{machine['gpu'] or 'no GPU: ' + machine['cpu']}, torch {machine['torch']}, triton "
        f"{machine['triton']}", x=0.01, ha="left", fontsize=11,
    )  # fmt: skip
    figure.savefig(path, dpi=130)


def _panel(axes: Any, rows: list[Row]) -> None:
    names = dict.fromkeys(name for row in rows for name in row["seconds"])
    peers = iter(STYLES)
    floor = [(r["tokens"], [max(r["floor_seconds"].values()) / r["units"]]) for r in rows]
    _line(axes, floor, FLOOR, "floor")
    for name in names:
        points = [
            (r["tokens"], [x / r["units"] for x in r["seconds"][name]])
            for r in rows
            if name in r["seconds"]
        ]
        _line(axes, points, OWN if name == OURS else next(peers), _label(name))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator([row["tokens"] for row in rows]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: length_label(round(x))))
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.4g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(which="major", color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.16, y=0.14)
    # Below the axes, where no line can be.
    axes.legend(
        frameon=False, fontsize=8.5, loc="upper left", bbox_to_anchor=(-0.05, -0.14), ncols=2
    )


def _label(name: str) -> str:
    return "rwkvx" if name == OURS else name


def _line(
    axes: Any, points: list[tuple[int, list[float]]], style: tuple[str, str, str], label: str
) -> None:
    colour, marker, kind = style
    tokens = [n for n, _ in points]
    micro = [[1e6 * x for x in values] for _, values in points]
    middle = [median(values) for values in micro]
    axes.plot(
        tokens,
        middle,
        kind,
        marker=marker,
        color=colour,
        label=label,
        linewidth=1.8,
        markersize=5.5,
    )
    axes.fill_between(
        tokens, [min(v) for v in micro], [max(v) for v in micro], color=colour, alpha=0.18,
        linewidth=0,
    )  # fmt: skip
    axes.annotate(
        f"{middle[-1]:,.3g}", (tokens[-1], middle[-1]), textcoords="offset points", xytext=(6, 0),
        va="center", fontsize=8, color=colour,
    )  # fmt: skip
