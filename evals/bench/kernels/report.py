"""The table and the picture of a kernel benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rwkvx_evals.passkey.plan import length_label


def render(results: dict[str, Any]) -> str:
    """The report in Markdown."""
    machine = results["machine"]
    lines = [
        "# Kernels",
        "",
        f"{machine['gpu']}, torch {machine['torch']}, triton {machine['triton']}, commit "
        f"{machine['commit']}, {machine['date']}. Made by `rwkvx bench kernels`.",
        "",
        "Ceilings measured in the same run: "
        + "; ".join(f"{name} {x:,.0f}" for name, x in results["ceilings"].items())
        + ". A floor is the time in which a copy moves the bytes that no implementation can avoid. "
        "Errors are relative to float64; memory is what a call adds at its peak.",
        "",
        "| operation | tokens | ms | × floor | TFLOP/s | error | MiB | peers: ms (error) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results["cases"]:
        peers = "; ".join(
            f"{name} {1e3 * s:.3f} ({row['errors'][name]:.1e})"
            for name, s in row["seconds"].items()
            if name != "ours"
        )
        seconds, peak = row["seconds"]["ours"], row["peak_bytes"]
        lines.append(
            f"| {row['family']} | {row['tokens']:,} | {1e3 * seconds:.3f} | "
            f"{row['times_floor']:.1f} | {1e-12 * row['flops'] / seconds:.1f} | "
            f"{row['errors']['ours']:.1e} | {'' if peak is None else f'{peak / 2**20:,.0f}'} | "
            f"{peers or 'none installed'} |"
        )
    return "\n".join([*lines, ""])


def draw(results: dict[str, Any], path: Path) -> None:
    """Microseconds per token by length, a panel for each family of cases, as a PNG."""
    families = list(dict.fromkeys(row["family"] for row in results["cases"]))
    figure = Figure(figsize=(4.4 * len(families), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for place, family in enumerate(families):
        rows = [row for row in results["cases"] if row["family"] == family]
        tokens = [row["tokens"] for row in rows]
        axes = figure.add_subplot(1, len(families), place + 1)
        floor = [1e6 * row["floor_seconds"] / row["tokens"] for row in rows]
        axes.plot(tokens, floor, "s--", color="#777777", label="floor: its bytes")
        for name in rows[0]["seconds"]:
            values = [1e6 * row["seconds"][name] / row["tokens"] for row in rows]
            axes.plot(tokens, values, "o-", label="rwkvx" if name == "ours" else name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(tokens, [length_label(n) for n in tokens])
        axes.set_xlabel("tokens")
        axes.set_ylabel("microseconds per token")
        axes.set_title(family, loc="left", fontsize=11)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
