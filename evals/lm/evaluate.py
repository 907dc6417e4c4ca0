"""A whole lm-eval run: tasks, model, journal, files."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import click
import lm_eval
import lm_eval.evaluator
import lm_eval.utils
from lm_eval.tasks import TaskManager

from rwkvx.errors import InputError
from rwkvx_evals.files import machine, peak_memory_bytes, write_atomically, write_json, write_text
from rwkvx_evals.interface import StateTools
from rwkvx_evals.journal import Journal
from rwkvx_evals.lm.chart import draw_chart
from rwkvx_evals.lm.model import RwkvxLM
from rwkvx_evals.lm.report import Results, collect, render
from rwkvx_evals.lm.tasks import load_tasks

# Enough draws for two digits of a perplexity's standard error; lm-eval's 100 000 take minutes.
BOOTSTRAP_DRAWS = 1000


@contextlib.contextmanager
def _templates_compiled_once() -> Iterator[None]:
    """lm-eval compiles a task's templates again for every item: most of its time before scoring.

    It also asks git for a commit of the current folder, which complains outside a repository.
    """
    environment = lm_eval.utils.env
    compiled = functools.cache(environment.from_string)
    with (
        mock.patch.object(environment, "from_string", compiled),
        mock.patch.object(lm_eval.evaluator, "get_git_commit_hash", return_value=None),
    ):
        yield


@contextlib.contextmanager
def _quiet_lm_eval() -> Iterator[None]:
    """Keeps lm-eval's own bars and remarks away, and its bootstrap inside this process."""
    # The hub client warns at every retry; what it says in the end becomes one line of ours.
    loggers = [logging.getLogger(name) for name in ("lm_eval", "huggingface_hub", "datasets")]
    levels = [logger.level for logger in loggers]
    workers = os.environ.get("DISABLE_MULTIPROC")
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if workers is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = workers


def evaluate(
    model: Any,
    name: str,
    tasks: Sequence[str],
    out: Path,
    *,
    folder: Path | None = None,
    limit: int | None = None,
    batch: int | None = None,
    max_length: int | None = None,
    truncate: str | None = None,
    dtype: str = "float32",
    tools: StateTools | None = None,
    quiet: bool = False,
) -> Results:
    """Runs lm-eval's tasks and writes all files; returns the results.

    Raises InputError for unknown tasks, missing data, over-long requests, a full disk.
    """
    began = time.perf_counter()
    if limit is not None and limit < 1:
        raise InputError(f"limit {limit}: at least one item is needed")
    if folder is None and not quiet:
        click.echo("no data folder is named: asking the hub", err=True)
    with _quiet_lm_eval():
        loaded = load_tasks(tasks, folder)
    if not quiet:
        for task, source in loaded.sources.items():
            click.echo(f"{task}: lm-eval's definition, data from {source}", err=True)
    with Journal(out / "requests.jsonl") as journal:
        lm = RwkvxLM(
            model,
            dtype=dtype,
            batch_size=batch,
            max_length=max_length,
            truncate=truncate,
            journal=journal,
            tools=tools,
            quiet=quiet,
        )
        found = _run(lm, loaded.tasks, limit)
    results = collect(
        found,
        model=name,
        weights=model.fingerprint(),
        sources=loaded.sources,
        asked=lm.asked,
        failures=lm.failures,
        truncated=lm.truncated,
        settings={
            "limit": limit,
            "max_length": max_length,
            "truncate": truncate,
            "dtype": dtype,
            "bootstrap_draws": BOOTSTRAP_DRAWS,
            "lm_eval": metadata.version("lm_eval"),
        },
    )
    _write(results, out, time.perf_counter() - began)
    return results


def _write(results: Results, out: Path, seconds: float) -> None:
    """All files; what differs from run to run is in timing.json alone."""
    write_json(out / "results.json", results)
    write_atomically(out / "scores.png", lambda path: draw_chart(results, path))
    write_text(out / "report.md", render(results))
    memory = peak_memory_bytes()
    timing = {"seconds": round(seconds, 2), "peak_memory_bytes": memory, "machine": machine()}
    write_json(out / "timing.json", timing)


def _run(lm: RwkvxLM, tasks: list[Any], limit: int | None) -> dict[str, Any]:
    with _quiet_lm_eval(), _templates_compiled_once():
        found = lm_eval.simple_evaluate(
            model=lm,
            tasks=tasks,
            limit=limit,
            log_samples=False,
            bootstrap_iters=BOOTSTRAP_DRAWS,
            task_manager=TaskManager(include_defaults=False),
        )
    assert found is not None
    return dict(found)
