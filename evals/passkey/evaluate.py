"""A whole passkey evaluation: plan, run, files."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import Any

import click

from rwkvx.data.folder import read_text
from rwkvx.data.passkey import Filler, PasskeyBuilder, prose_filler, standard_filler
from rwkvx_evals.files import machine, peak_memory_bytes, write_json
from rwkvx_evals.interface import LanguageModel, StateTools, Tokenizer
from rwkvx_evals.long.evaluate import announce, estimate, plan_jobs, target_of
from rwkvx_evals.long.plan import Plan
from rwkvx_evals.long.plan import Settings as RunSettings
from rwkvx_evals.long.shards import Claims, SharedJournal
from rwkvx_evals.long.work import Worker, timing
from rwkvx_evals.models.own import OwnModel
from rwkvx_evals.passkey.plan import PasskeyTask, Settings
from rwkvx_evals.passkey.report import Results, as_row, collect, sort_rows, write_report


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
    own = OwnModel(model, name, tools or StateTools())
    filler = load_filler(own.tokenizer, haystack)
    task = PasskeyTask(settings, PasskeyBuilder(own.tokenizer), filler)
    for length in settings.lengths:  # none is skipped here
        task.builder.prefix_length(length, 0.0)
    plan = Plan(
        {task.name: task}, settings.lengths, settings.samples, None, target_of(own),
        RunSettings(dtype=settings.dtype), batch=batch,
    )  # fmt: skip
    with SharedJournal(out / "journal") as journal, closing(Claims(out / "claims")) as claims:
        jobs = plan_jobs(own, plan, journal)
        worker = Worker(journal, claims, own.device, quiet=quiet)
        left = sum(job.tokens for job in worker.missing(jobs))
        if not quiet:
            click.echo(announce(plan, None, left), err=True)
            if left:
                click.echo(estimate(own, plan, left), err=True)
        worker.run(jobs)
        rows = [as_row(settings, q, journal.rows[q.key]) for q in plan.questions.values()]
        own_rows = [row for key, row in journal.rows.items() if key.endswith(f"-{journal.shard}")]
        read = sum(entry["read"] for entry in timing(own_rows).values())
    results = collect(settings, filler, plan, rows, model=name)
    write_report(results, sort_rows(rows), out)
    write_json(out / "timing.json", _timing(own, read, time.perf_counter() - began))
    return results


def _timing(model: OwnModel, read: int, seconds: float) -> dict[str, Any]:
    """What differs from run to run, kept out of the report; of the last start."""
    return {
        "seconds": round(seconds, 2),
        "prompt_tokens_read": read,
        "tokens_per_second": round(read / seconds, 1),
        "peak_memory_bytes": peak_memory_bytes(),
        "device": str(model.device),
        "machine": machine(),
    }
