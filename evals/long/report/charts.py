"""Small charts as SVG that takes its colours from the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from rwkvx_evals.lengths import length_label

COLOURS = 6  # --s1 to --s6 of the style sheet
FIRST_SHOWN = 64  # tokens before, where curves of the loss begin


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """One stroke of a class of the style sheet."""
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def label(x: float, y: float, text: str, anchor: str = "middle", kind: str = "") -> str:
    """A short text."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def picture(width: float, height: float, parts: Sequence[str], name: str) -> Markup:
    """The whole, with a name for readers who do not see it."""
    body = "".join(parts)
    title = Markup.escape(name)
    return Markup(
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{title}">{body}</svg>'
    )


def score_curve(entries: Sequence[tuple[int, dict[str, Any]]], name: str) -> Markup:
    """Score by length with its interval.

    entries: (length, entry of results.json), ascending; those without a score leave a gap.
    """
    width, height, left, right, top, bottom = 280.0, 150.0, 30.0, 12.0, 10.0, 22.0

    def y(score: float) -> float:
        return top + (1 - score) * (height - top - bottom)

    step = (width - left - right) / max(1, len(entries) - 1)
    parts = []
    for share in (0, 0.5, 1):
        parts.append(line(left, y(share), width - right, y(share), "rule"))
        parts.append(label(left - 6, y(share) + 4, f"{100 * share:.0f}", "end"))
    scored = [(left + i * step, n, e) for i, (n, e) in enumerate(entries) if e["score"] is not None]
    if scored and scored[0][2]["score"]:
        height_of = y(0.85 * scored[0][2]["score"])
        parts.append(line(left, height_of, width - right, height_of, "threshold"))
    every = math.ceil(len(entries) / 7)
    for i, (length, _) in enumerate(entries):
        if i % every == 0:
            parts.append(label(left + i * step, height - 5, length_label(length)))
    points = " ".join(f"{x:.1f},{y(e['score']):.1f}" for x, _, e in scored)
    parts.append(f'<polyline class="curve" points="{points}"/>')
    for x, _, entry in scored:
        parts.append(line(x, y(entry["low"]), x, y(entry["high"]), "error"))
        parts.append(f'<circle class="dot" cx="{x:.1f}" cy="{y(entry["score"]):.1f}" r="3.5"/>')
    return picture(width, height, parts, f"Score by length of {name}")


def late(buckets: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the first buckets, whose high losses would flatten all that matters."""
    found = [b for b in buckets if b["from"] >= FIRST_SHOWN]
    return found if len(found) > 1 else list(buckets)


def round_ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers that enclose both."""
    span = max(high - low, 1e-3) / 5
    unit = 10 ** math.floor(math.log10(span))
    step = next(unit * k for k in (1, 2, 5, 10) if unit * k >= span)
    first = math.floor(low / step)
    last = max(first + 1, math.ceil(high / step))
    return [round(i * step, 10) for i in range(first, last + 1)]


def loss_curves(lengths: dict[str, dict[str, Any]]) -> Markup | str:
    """Loss by position, one curve for each length of window, on a logarithmic axis."""
    curves = [(int(n), late(entry["buckets"])) for n, entry in lengths.items() if entry["buckets"]]
    if not curves:
        return ""
    width, height, left, right, top, bottom = 520.0, 270.0, 40.0, 16.0, 26.0, 36.0
    values = [b["loss"] + s * (b["stderr"] or 0) for _, bs in curves for b in bs for s in (-1, 1)]
    ticks = round_ticks(min(values), max(values))
    low, high = ticks[0], ticks[-1]
    first = curves[0][1][0]["from"]
    last = max(b["to"] for _, bs in curves for b in bs)
    scale = (width - left - right) / math.log2(last / first)

    def x(position: float) -> float:
        return left + scale * math.log2(position / first)

    def y(loss: float) -> float:
        return top + (high - loss) / (high - low) * (height - top - bottom)

    parts = []
    for loss in ticks:
        parts.append(line(left, y(loss), width - right, y(loss), "rule"))
        parts.append(label(left - 6, y(loss) + 4, f"{loss:.4g}", "end"))
    for power in range(math.ceil(math.log2(first)), math.ceil(math.log2(last)) + 1, 2):
        parts.append(label(x(2**power), height - 18, length_label(2**power)))
    parts.append(label((left + width - right) / 2, height - 2, "tokens before"))
    for number, (length, buckets) in enumerate(curves):
        colour = f"var(--s{number % COLOURS + 1})"
        centres = [(x(math.sqrt(b["from"] * b["to"])), b) for b in buckets]
        upper = [f"{cx:.1f},{y(b['loss'] + (b['stderr'] or 0)):.1f}" for cx, b in centres]
        lower = [f"{cx:.1f},{y(b['loss'] - (b['stderr'] or 0)):.1f}" for cx, b in centres]
        band = " ".join([*upper, *reversed(lower)])
        parts.append(f'<polygon class="band" style="fill:{colour}" points="{band}"/>')
        points = " ".join(f"{cx:.1f},{y(b['loss']):.1f}" for cx, b in centres)
        parts.append(f'<polyline class="curve" style="stroke:{colour}" points="{points}"/>')
        place = left + 70 * number
        parts.append(f'<circle cx="{place + 5:.1f}" cy="10" r="4" style="fill:{colour}"/>')
        parts.append(label(place + 14, 14, length_label(length), "start"))
    return picture(width, height, parts, "Loss by position")
