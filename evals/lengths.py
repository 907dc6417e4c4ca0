"""Lengths in tokens, as people write them."""

from __future__ import annotations

import re

from rwkvx.errors import InputError, shown
from rwkvx.ranges import TOKENS, check

_UNITS = {"": 1, "k": 1024, "m": 1024 * 1024}


def parse_length(text: str) -> int:
    """`4096`, `4k` (× 1024) or `1m` (× 1024²) as tokens; raises InputError for anything else."""
    match = re.fullmatch(r"(\d{1,12})([km]?)", text.strip().lower())
    if match is None or int(match[1]) == 0:
        raise InputError(f"length {shown(text)} is not a positive number such as 1000, 4k or 1m")
    length = int(match[1]) * _UNITS[match[2]]
    check("length", length, TOKENS)
    return length


def parse_lengths(text: str) -> tuple[int, ...]:
    """A comma-separated list of lengths, sorted, each once."""
    return tuple(sorted({parse_length(part) for part in text.split(",")}))


def length_label(length: int) -> str:
    """4096 → "4k", 1048576 → "1m", others in full."""
    for unit in ("m", "k"):
        if length % _UNITS[unit] == 0:
            return f"{length // _UNITS[unit]}{unit}"
    return str(length)
