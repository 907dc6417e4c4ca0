"""Loss by position: windows of one long text, each read from a fresh state."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from rwkvx.data.folder import read_text
from rwkvx.errors import InputError
from rwkvx.progress import progress
from rwkvx_evals.interface import LanguageModel

PIECE = 1024  # tokens whose logits are held at once
FIRST = 64  # tokens of the first bucket; each later one is as long as all before it
BOOK = "long_docs/tolstoy_war_and_peace.txt.xz"  # in the data folder; in no training text


def find_book(folder: Path | None) -> Path | None:
    """War and Peace in the data folder, if it is there."""
    path = folder / BOOK if folder is not None else None
    return path if path is not None and path.is_file() else None


@torch.no_grad()
def loss_by_position(
    model: LanguageModel, text: str, length: int, rows: int, quiet: bool = False
) -> dict[str, Any]:
    """Read `rows` windows of `length` tokens, spread evenly over the text.

    Returns:
        "buckets": for positions from ... to: mean "loss" in nats a token with its "stderr" over the
        windows; "loss", "stderr" over all; "bits_per_byte" of UTF-8, by the bytes a token of the
        whole text has.

    Raises:
        InputError: the text has no window of that length.
    """
    ids = torch.tensor(model.tokenizer.encode(text, add_special_tokens=False))
    if len(ids) <= length:
        raise InputError(f"the text has {len(ids):,} tokens, too few for a window of {length:,}")
    starts = torch.linspace(0, len(ids) - length - 1, rows).long().tolist()
    device = getattr(model, "device", "cpu")
    losses = torch.empty(rows, length, dtype=torch.float64)
    with progress(rows * length, "loss", quiet=quiet) as bar:
        for row, start in enumerate(starts):
            window, state = ids[start : start + length + 1][None], None
            for at in range(0, length, PIECE):
                part = window[:, at : min(at + PIECE, length)]
                logits, state = model(part.to(device), state, logits="all")
                assert logits is not None
                targets = window[0, at + 1 : at + 1 + part.shape[1]].to(logits.device)
                found = F.cross_entropy(logits[0].float(), targets, reduction="none")
                losses[row, at : at + part.shape[1]] = found.cpu().double()
                bar.update(part.shape[1])
    bounds = [0, FIRST]
    while bounds[-1] < length:
        bounds.append(2 * bounds[-1])
    buckets = [
        {"from": a, "to": min(b, length), **mean_and_error(losses[:, a:b].mean(1))}
        for a, b in pairwise(bounds)
        if a < length
    ]
    whole = mean_and_error(losses.mean(1))
    bytes_a_token = len(text.encode("utf-8")) / len(ids)
    return {
        **whole,
        "bits_per_byte": whole["loss"] / math.log(2) / bytes_a_token,
        "bits_per_byte_stderr": whole["stderr"] / math.log(2) / bytes_a_token,
        "length": length,
        "rows": rows,
        "buckets": buckets,
    }


def mean_and_error(rows: torch.Tensor) -> dict[str, float]:
    """Mean over windows and its standard error."""
    error = float(rows.std()) / math.sqrt(len(rows)) if len(rows) > 1 else math.nan
    return {"loss": float(rows.mean()), "stderr": error}


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
