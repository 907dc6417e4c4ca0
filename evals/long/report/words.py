"""Numbers as people read them, and the templates that use them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from rwkvx_evals.lengths import length_label


def duration(seconds: float) -> str:
    """3.4 s, 12 min, 4.5 h."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(number: int | None) -> str:
    """Bytes: 812 MiB, 3.25 GiB; a dash for none."""
    if not number:
        return "–"
    return f"{number / 2**20:,.0f} MiB" if number < 2**30 else f"{number / 2**30:,.2f} GiB"


def plus_minus(value: float | None, error: float | None) -> str:
    """2.3412 ± 0.0031; a dash for none."""
    if value is None:
        return "–"
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def percent(share: float | None) -> str:
    """0.5 → "50.0 %", None → "–"."""
    return "–" if share is None else f"{100 * share:.1f} %"


def shade(score: float) -> str:
    """Which text a cell of this score has: its colour runs from the page's to a strong one."""
    return " high" if score >= 0.75 else " middle" if score >= 0.55 else ""


def breakable(name: str) -> Markup:
    """A name that may be broken after its underscores."""
    return Markup(str(Markup.escape(name)).replace("_", "_<wbr>"))


Filters = Mapping[str, Callable[..., Any]]
FILTERS: Filters = {
    "length_label": length_label,
    "duration": duration,
    "bytes": size,
    "plus_minus": plus_minus,
    "shade": shade,
    "breakable": breakable,
}


def fill(
    template: str,
    *folders: Path,
    filters: Mapping[str, Callable[..., Any]] | None = None,
    **values: Any,
) -> str:
    """A page; every text in it is escaped.

    folders: where templates are beside this folder. filters: what they need beside FILTERS.
    """
    here = Path(__file__).parent
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader([here, *folders]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    made.filters |= {**FILTERS, **(filters or {})}
    made.globals["style"] = Markup((here / "style.css").read_text(encoding="utf-8"))
    return made.get_template(template).render(**values)
