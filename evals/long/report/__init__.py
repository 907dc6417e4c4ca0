"""The report of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_report(results: dict[str, Any], rows: list[dict[str, Any]], folder: Path) -> None:
    return None
