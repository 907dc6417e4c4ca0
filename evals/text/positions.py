"""Loss by position: windows of one long text, each read from a fresh state."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from rwkvx.data.folder import read_text
from rwkvx.errors import InputError
from rwkvx.progress import progress
from rwkvx_evals.interface import LanguageModel
from rwkvx_evals.long.loss import collect, losses, measured
from rwkvx_evals.models.own import OwnModel

BOOK = "long_docs/tolstoy_war_and_peace.txt.xz"  # in the data folder; in no training text


def find_book(folder: Path | None) -> Path | None:
    """War and Peace in the data folder, if it is there."""
    path = folder / BOOK if folder is not None else None
    return path if path is not None and path.is_file() else None


def loss_by_position(
    model: LanguageModel, text: str, length: int, rows: int, quiet: bool = False
) -> dict[str, Any]:
    """Read `rows` windows of `length` tokens, spread evenly over the text; all but the first token
    are asked for.

    Returns:
        "buckets": for so many tokens before, "from" to "to": mean "loss" in nats a token with its
        "stderr" over the windows; "loss", "stderr" over all; "bits_per_byte" of UTF-8, by the bytes
        a token of the whole text has.

    Raises:
        InputError: the text has no window of that length; a loss that is not finite.
    """
    ids = np.asarray(model.tokenizer.encode(text, add_special_tokens=False), dtype=np.int64)
    if len(ids) < length:
        raise InputError(f"the text has {len(ids):,} tokens, too few for a window of {length:,}")
    starts = np.linspace(0, len(ids) - length, rows).astype(int)
    windows = []
    with progress(rows * length, "loss", quiet=quiet) as bar:
        for start in starts:
            window = ids[None, start : start + length]
            row = measured(losses(OwnModel(model), window, 1, bar.update)[0])
            if row["status"] != "ok":
                raise InputError("a loss is not finite: try a wider dtype, and check the weights")
            windows.append(row)
    found = collect(windows)
    for x in (found, *found["buckets"]):  # one window alone has no error
        x["stderr"] = math.nan if x["stderr"] is None else x["stderr"]
    bits = len(ids) / len(text.encode("utf-8")) / math.log(2)
    return {
        **{key: found[key] for key in ("loss", "stderr", "buckets")},
        "bits_per_byte": found["loss"] * bits,
        "bits_per_byte_stderr": found["stderr"] * bits,
        "length": length,
        "rows": rows,
    }


def as_lines(found: dict[str, Any]) -> list[str]:
    """For the terminal."""
    lines = [
        f"{x['from']:>7,} to {x['to']:>7,}  {x['loss']:.3f} ± {x['stderr']:.3f} nats a token"
        for x in found["buckets"]
    ]
    bits = f"{found['bits_per_byte']:.3f} ± {found['bits_per_byte_stderr']:.3f}"
    return [
        *lines,
        f"bits per byte: {bits} ({found['rows']} windows of {found['length']:,} tokens)",
    ]


def measure_book(model: LanguageModel, book: Path, length: int, rows: int) -> dict[str, Any]:
    """`loss_by_position` of a file."""
    return {"text": book.name, **loss_by_position(model, read_text(book), length, rows)}
