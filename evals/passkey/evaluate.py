"""A whole passkey evaluation: plan, run, files."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from rwkvx.data.folder import read_text
from rwkvx.data.passkey import Filler, PasskeyBuilder, prose_filler, standard_filler
from rwkvx.errors import InputError
from rwkvx.files import user_path
from rwkvx_evals.files import machine, peak_memory_bytes, write_json
from rwkvx_evals.interface import LanguageModel, StateTools, Tokenizer
from rwkvx_evals.journal import Journal
from rwkvx_evals.passkey.plan import Plan, Settings
from rwkvx_evals.passkey.report import Results, collect, write_report
from rwkvx_evals.passkey.run import PasskeyRun, check_row


def find_haystack(name: str, data: Path | None) -> Path:
    """`name` as a file, or inside the data folder or its `long_docs`; raises InputError."""
    places = [user_path(name)]
    if data is not None:
        places += [data / name, data / "long_docs" / name]
    for place in places:
        if place.is_file():
            return place
    looked = ", ".join(str(place) for place in places)
    raise InputError(f"haystack {name!r} is not a file (looked at {looked})")


def load_filler(tokenizer: Tokenizer, haystack: Path | None) -> Filler:
    """The standard sentences, or real prose from a .txt or .xz file."""
    if haystack is None:
        return standard_filler(tokenizer)
    return prose_filler(tokenizer, read_text(haystack), haystack.name)


def evaluate(
    model: LanguageModel,
    name: str,
    settings: Settings,
    out: Path,
    *,
    haystack: Path | None = None,
    batch: int | None = None,
    tools: StateTools | None = None,
    quiet: bool = False,
) -> Results:
    """Answers what the journal in `out` lacks and writes all files; returns the results.

    Raises InputError for a length below the prompt's own, an unreadable haystack, a full disk.
    """
    began = time.perf_counter()
    tokenizer = model.tokenizer
    weights = model.fingerprint()
    filler = load_filler(tokenizer, haystack)
    plan = Plan(settings, PasskeyBuilder(tokenizer), filler, weights)
    with Journal(out / "samples.jsonl", check_row) as journal:
        run = PasskeyRun(model, plan, journal, batch=batch, tools=tools, quiet=quiet)
        if not quiet:
            click.echo(announce(plan, run), err=True)
        run.run()
        rows = [journal.rows[sample.key] for sample in plan.samples]
        results = collect(plan, journal.rows, model=name, weights=weights)
    write_report(results, rows, out)
    write_json(out / "timing.json", _timing(run, time.perf_counter() - began))
    return results


def announce(plan: Plan, run: PasskeyRun) -> str:
    """What is about to be read, and about how long that takes."""
    left, shared, naive = run.tokens_to_read(), plan.shared_tokens(), plan.naive_tokens()
    text = (
        f"{len(plan.samples)} samples; {shared:,} prompt tokens with shared prefixes "
        f"({naive:,} without)"
    )
    if left < shared:
        text += f"; {left:,} are left to read"
    if left:
        speed = run.probe().tokens_per_second
        text += f"; about {_duration(left / speed)} at the {speed:,.0f} tokens/s of a short text"
    return text


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _timing(run: PasskeyRun, seconds: float) -> dict[str, Any]:
    """What differs from run to run, kept out of the report."""
    return {
        "seconds": round(seconds, 2),
        "prompt_tokens_read": run.tokens_read,
        "tokens_per_second": round(run.tokens_read / seconds, 1),
        "peak_memory_bytes": peak_memory_bytes(),
        "device": str(run.device),
        "machine": machine(),
    }
