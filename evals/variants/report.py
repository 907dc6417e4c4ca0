"""A table and a picture of the comparison; error bars are standard errors, of shares Wilson's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rwkvx.files import write_text
from rwkvx_evals.variants.runs import LABELS

COLOURS = ("#3b6ea5", "#b35900", "#4a8f3c", "#7d4fa0")
Found = dict[str, dict[int, dict[str, Any]]]  # by name and seed


def write_report(found: Found, trained: int, out: Path) -> None:
    """report.md and comparison.png; `trained`: tokens of a training sequence."""
    out.mkdir(parents=True, exist_ok=True)
    draw(found, trained, out / "comparison.png")
    write_text(out / "report.md", "\n".join([*_table(found), "", *_positions(found)]) + "\n")


def _table(found: Found) -> list[str]:
    lines = [
        "# Four architectures, trained alike",
        "",
        "| model | seed | parameters | loss (nats a token) | bits per byte | LAMBADA | "
        "passkey | needle in prose |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, seeds in found.items():
        for seed, x in seeds.items():
            text = x["text"]
            cells = [
                LABELS[name],
                str(seed),
                f"{x['parameters']:,}",
                f"{text['loss']:.3f} ± {text['stderr']:.3f}",
                f"{text['bits_per_byte']:.3f} ± {text['bits_per_byte_stderr']:.3f}",
                ", ".join(_lambada(row) for row in x["lambada"]),
                _by_length(x["passkey"]),
                _by_length(x["niah"]),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _lambada(row: dict[str, Any]) -> str:
    error = f" ± {row['stderr']:.3f}" if row["stderr"] else ""
    return f"{row['metric']} {row['value']:.3f}{error}"


def _by_length(rows: list[dict[str, Any]]) -> str:
    return ", ".join(f"{x['length']:,}: {100 * x['accuracy']:.0f} %" for x in rows)


def _positions(found: Found) -> list[str]:
    places = next(iter(next(iter(found.values())).values()))["text"]["buckets"]
    head = [f"{x['from']:,}–{x['to']:,}" for x in places]
    lines = ["## Loss by position", "", f"| model | seed | {' | '.join(head)} |"]
    lines.append("|---|---" + "|---" * len(head) + "|")
    for name, seeds in found.items():
        for seed, x in seeds.items():
            cells = [f"{b['loss']:.3f} ± {b['stderr']:.3f}" for b in x["text"]["buckets"]]
            lines.append(f"| {LABELS[name]} | {seed} | {' | '.join(cells)} |")
    return lines


def draw(found: Found, trained: int, path: Path) -> None:
    """Loss by position and both retrievals by length; an upright line: the training length."""
    figure = Figure(figsize=(12.0, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    loss, passkey, niah = figure.subplots(1, 3)
    for (name, seeds), colour in zip(found.items(), COLOURS, strict=False):
        for number, x in enumerate(seeds.values()):
            label = None if number else LABELS[name]
            buckets = x["text"]["buckets"]
            style = {"color": colour, "label": label, "marker": "o", "markersize": 3}
            loss.errorbar(
                [b["to"] for b in buckets], [b["loss"] for b in buckets],
                yerr=[b["stderr"] for b in buckets], capsize=2, **style,
            )  # fmt: skip
            for axes, task in ((passkey, "passkey"), (niah, "niah")):
                rows = x[task]
                shares = [100 * r["accuracy"] for r in rows]
                low, high = zip(*(r["interval"] for r in rows), strict=True)
                errors = [
                    [max(0.0, s - 100 * a) for s, a in zip(shares, low, strict=True)],
                    [max(0.0, 100 * b - s) for s, b in zip(shares, high, strict=True)],
                ]
                axes.errorbar([r["length"] for r in rows], shares, yerr=errors, capsize=2, **style)
    for axes, title in ((loss, "loss by position (nats a token)"), (passkey, "passkey (%)"),
                        (niah, "needle in prose (%)")):  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.axvline(trained, color="#888888", linewidth=1)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("tokens")
        axes.spines[["top", "right"]].set_visible(False)
    loss.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
