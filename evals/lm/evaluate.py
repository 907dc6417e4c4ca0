"""A whole lm-eval run: tasks, model, journal, files."""

from __future__ import annotations

import json
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import lm_eval
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager

from rwkvx.errors import InputError
from rwkvx_evals.files import (
    machine,
    peak_memory_bytes,
    short,
    write_atomically,
    write_json,
    write_text,
)
from rwkvx_evals.folder import claim, owner, provenance
from rwkvx_evals.interface import StateTools
from rwkvx_evals.journal import Journal
from rwkvx_evals.lm.answers import check_row
from rwkvx_evals.lm.chart import draw_chart
from rwkvx_evals.lm.harness import (
    collected_warnings,
    quiet_lm_eval,
    refusals_in_one_line,
    templates_compiled_once,
)
from rwkvx_evals.lm.load import tokenizer_folder
from rwkvx_evals.lm.model import RwkvxLM
from rwkvx_evals.lm.report import Results, collect, render
from rwkvx_evals.lm.settings import Settings
from rwkvx_evals.lm.tasks import Loaded, load_tasks

# Enough draws for two digits of a perplexity's standard error; lm-eval's 100 000 take minutes.
BOOTSTRAP_DRAWS = 1000
# Besides rwkvx, torch and Python.
_PACKAGES = ("lm_eval", "transformers", "datasets", "numpy")


def whose(model: Any, name: str, settings: Settings, folder: Path | None) -> dict[str, Any]:
    """What the results of a run belong to; see `rwkvx_evals.folder`."""
    data = "the hub" if folder is None else "a folder"
    return owner("lm", name, model.fingerprint(), {**settings.as_dict(), "data": data})


def evaluate(
    model: Any,
    name: str,
    settings: Settings,
    out: Path,
    *,
    folder: Path | None = None,
    batch: int | None = None,
    origin: str | None = None,
    log_samples: bool = False,
    unsafe_code: bool = False,
    tools: StateTools | None = None,
    quiet: bool = False,
) -> Results:
    """Runs lm-eval's tasks and writes all files; returns the results.

    origin: what the model was loaded from, to find its chat template, and for tasks that make
    prompts of so many tokens its tokenizer. log_samples: also write every item, request and
    answer. unsafe_code: allow tasks that run generated code.
    Raises InputError for unknown tasks, missing data, over-long requests, a folder of other
    results, a full disk.
    """
    began = time.perf_counter()
    if out.suffix == ".json":  # a file, for lm-eval
        raise InputError(f"--out {out.name[-60:]} is a folder here: give it another name")
    loaded = _load(settings, folder, origin, quiet)
    claim(out, whose(model, name, settings, folder))
    with Journal(out / "requests.jsonl", check_row) as journal:
        lm = RwkvxLM(
            model,
            dtype=settings.dtype,
            batch_size=batch,
            max_length=settings.max_length,
            truncate=settings.truncate,
            chat_template=settings.chat_file,
            origin=origin,
            journal=journal,
            tools=tools,
            quiet=quiet,
            strict=False,
        )
        tracker = EvaluationTracker(output_path=str(out))
        keep = log_samples or settings.predict_only
        with collected_warnings() as warnings:
            found = _run(lm, loaded, settings, tracker, name, keep, unsafe_code)
    results = collect(
        found,
        model=name,
        weights=model.fingerprint(),
        sources=loaded.sources,
        lm=lm,
        settings=settings,
        chance=_chance(loaded),
        warnings=dict(warnings),
        facts={"bootstrap_draws": BOOTSTRAP_DRAWS, "lm_eval": version("lm_eval")},
    )
    _write(results, out, time.perf_counter() - began)
    if not lm.failed:
        _write_as_lm_eval(found, tracker, out)
    return results


def _load(settings: Settings, folder: Path | None, origin: str | None, quiet: bool) -> Loaded:
    """The tasks, and a line for each on where its data are from."""
    if folder is None and not quiet:
        click.echo("no data folder is named: asking the hub", err=True)
    with quiet_lm_eval():
        include = [Path(path).expanduser() for path in settings.include]
        metadata = {**_tokenizer(origin), **settings.metadata}
        loaded = load_tasks(settings.tasks, folder, include, metadata)
    if not quiet:
        for task, source in loaded.sources.by_task.items():
            click.echo(f"{task}: data: {source}", err=True)
    return loaded


def _tokenizer(origin: str | None) -> dict[str, str]:
    """A model's tokenizer for lm-eval's metadata, as its own command takes it from model_args."""
    folder = tokenizer_folder(origin) if origin is not None else None
    return {} if folder is None else {"pretrained": folder}


def _write(results: Results, out: Path, seconds: float) -> None:
    """All files; what differs from run to run stands under "run", and in timing.json."""
    write_json(out / "results.json", {**results, "run": provenance(_PACKAGES)})
    write_atomically(out / "scores.png", lambda path: draw_chart(results, path))
    write_text(out / "report.md", render(results))
    memory = peak_memory_bytes()
    timing = {"seconds": round(seconds, 2), "peak_memory_bytes": memory, "machine": machine()}
    write_json(out / "timing.json", timing)


def _run(
    lm: RwkvxLM,
    loaded: Loaded,
    settings: Settings,
    tracker: EvaluationTracker,
    name: str,
    log_samples: bool,
    unsafe_code: bool,
) -> dict[str, Any]:
    python, numpy, torch, fewshot = settings.seeds
    if settings.chat:
        lm.chat_template(settings.chat)
    multiturn = settings.fewshot_as_multiturn
    with quiet_lm_eval(), templates_compiled_once(), refusals_in_one_line():
        found = lm_eval.simple_evaluate(
            model=lm,
            model_args={"pretrained": name, "dtype": settings.dtype},
            tasks=loaded.tasks,
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            samples=dict(settings.samples) if settings.samples is not None else None,
            log_samples=log_samples,
            predict_only=settings.predict_only,
            evaluation_tracker=tracker,
            system_instruction=settings.system_instruction,
            apply_chat_template=settings.chat,
            fewshot_as_multiturn=bool(settings.chat) if multiturn is None else multiturn,
            gen_kwargs=dict(settings.gen_kwargs) or None,
            bootstrap_iters=BOOTSTRAP_DRAWS,
            task_manager=TaskManager(include_defaults=False),
            random_seed=python,
            numpy_random_seed=numpy,
            torch_random_seed=torch,
            fewshot_random_seed=fewshot,
            confirm_run_unsafe_code=unsafe_code,
        )
    assert found is not None
    return dict(found)


def _chance(loaded: Loaded) -> dict[str, float]:
    """The share of right answers by guessing, by task; none where there are no choices."""
    tasks = [t for x in loaded.tasks for t in (x.get_all_tasks() if _is_group(x) else [x])]
    found = {}
    for task in tasks:
        if task.OUTPUT_TYPE == "multiple_choice" and "acc_mutual_info" not in task.aggregation():
            choices = Counter(instance.doc_id for instance in task.instances)
            found[task.task_name] = sum(1 / n for n in choices.values()) / len(choices)
    return found


def _is_group(item: Any) -> bool:
    return hasattr(item, "get_all_tasks")


def _write_as_lm_eval(found: dict[str, Any], tracker: EvaluationTracker, out: Path) -> None:
    """results_DATE.json and, where there are samples, samples_TASK_DATE.jsonl, as lm-eval's
    command writes them.

    lm-eval only remarks upon files that it could not write: what is there is read again.
    """
    samples = found.pop("samples", None)
    found["config"]["model"] = "rwkvx"
    with quiet_lm_eval():
        tracker.save_results_aggregated(results=found, samples=samples)
        for task in found["configs"] if samples is not None else ():
            tracker.save_results_samples(task_name=task, samples=samples[task])
    folder = out / str(tracker.general_config_tracker.model_name_sanitized)
    date = getattr(tracker, "date_id", None)
    try:
        written = json.loads((folder / f"results_{date}.json").read_text(encoding="utf-8"))
        whole = written["results"].keys() == found["results"].keys()
        for task, rows in (samples or {}).items():
            with open(folder / f"samples_{task}_{date}.jsonl", "rb") as file:
                whole = whole and sum(line.endswith(b"\n") for line in file) == len(rows)
    except (OSError, ValueError, KeyError):
        whole = False
    if not whole:
        raise InputError(
            f"lm-eval could not write its files to {short(folder)}: is the disk full? "
            "report.md and results.json are complete"
        )
