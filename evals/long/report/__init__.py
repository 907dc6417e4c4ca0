"""The report of a run: report.html, report.md and pictures, each whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rwkvx_evals.files import write_atomically, write_text


def write_report(results: dict[str, Any], rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """rows: of samples.jsonl. Raises InputError when the disk refuses."""
    # matplotlib takes a second to import, which a run that computes need not wait for.
    from rwkvx_evals.long.loss import NAME
    from rwkvx_evals.long.report.markdown import render_markdown
    from rwkvx_evals.long.report.page import render_page
    from rwkvx_evals.long.report.picture import draw_loss, draw_scores

    if results["tasks"]:
        write_atomically(folder / "scores.png", lambda path: draw_scores(results, path))
    if NAME in results:
        found = results[NAME]
        write_atomically(folder / "loss.png", lambda path: draw_loss(results, found, path))
    write_text(folder / "report.md", render_markdown(results, rows))
    write_text(folder / "report.html", render_page(results, rows))
