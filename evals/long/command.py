"""`rwkvx eval long`."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click

from rwkvx.cli.options import Within, device_option, dtype_option
from rwkvx.data.folder import data_folder
from rwkvx.errors import InputError, shown
from rwkvx.ranges import COUNT, SEED, TOKENS, Number, Whole
from rwkvx.training.facts import command_line
from rwkvx_evals.folder import default_folder
from rwkvx_evals.lengths import length_label, parse_lengths
from rwkvx_evals.long.loss import ABOUT, NAME
from rwkvx_evals.long.sources import find_haystack
from rwkvx_evals.long.task import Task

CONCURRENCY = Whole(1, 1024)
SECONDS = Number(0, 1e6, above=True)
_TOKENIZER = "world, bytes or a folder: of an endpoint or an export, or in place of a model's own."


@click.command("long")
@click.option("--model", help="A shipped name, a folder or file, or http://HOST:PORT/v1.")
@click.option(
    "--tasks",
    default="passkey",
    show_default=True,
    help="Names, patterns, families such as niah, or all; see --list.",
)
@click.option(
    "--lengths", default="1k,4k", show_default=True, help="Tokens of prompt and answer; 1k = 1024."
)
@click.option(
    "--samples", type=Within(COUNT), default=10, show_default=True, help="Of each task and length."
)
@click.option("--seed", type=Within(SEED), default=0, show_default=True, help="Of every sample.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Default: runs/long-MODEL-WEIGHTS-SETTINGS."
)
@click.option("--data", help="Folder with books and bAbI; default: RWKVX_DATA.")
@click.option("--haystack", help="One book in place of the data's: a file, or its name there.")
@click.option("--batch", type=Within(COUNT), help="Prompts read together; default: by length.")
@device_option
@dtype_option
@click.option(
    "--truncate",
    type=click.Choice(["left", "middle"]),
    help="Drop that part of prompts too long for the model, in place of skipping them.",
)
@click.option("--max-length", type=Within(TOKENS), help="In place of the model's own limit.")
@click.option("--tokenizer", help=_TOKENIZER)
@click.option("--model-name", help="The model's name at an endpoint.")
@click.option("--concurrency", type=Within(CONCURRENCY), default=8, show_default=True,
              help="Prompts at an endpoint at a time.")  # fmt: skip
@click.option("--timeout", type=Within(SECONDS), default=600.0,
              show_default=True, help="Seconds that a prompt may take at an endpoint.")  # fmt: skip
@click.option("--chat-template", is_flag=True, help="Prompts are messages of a user.")
@click.option("--device-map", help="Of a Hugging Face model, such as auto.")
@click.option("--trust-remote-code", is_flag=True, help="Let code in a Hugging Face folder run.")
@click.option("--no-sharing", is_flag=True, help="Read every prompt from its start.")
@click.option("--list", "listed", is_flag=True, help="Name the tasks, and stop.")
@click.option("--export", type=click.Path(path_type=Path), help="Write samples there, and stop.")
def long_command(listed: bool, export: Path | None, **options: Any) -> None:
    """Tasks of exact token lengths, for any model.

    What prompts share at their beginning is read once. A killed run goes on where it stopped when
    the same command is given again; several processes may work on one folder at once (start the
    command several times, or by torchrun). The report is report.html in the folder.

    \b
    Examples:
      rwkvx eval long --list
      rwkvx eval long --model passkey-tiny --tasks passkey,niah_single_1 --lengths 1k,4k,16k
      rwkvx eval long --model FOLDER --tasks niah,ruler --dtype bfloat16 --device cuda
      rwkvx eval long --model http://localhost:8000/v1 --model-name N --tokenizer FOLDER
      torchrun --nproc-per-node 8 --no-python rwkvx eval long --model FOLDER --device cuda
    """
    if listed:
        click.echo(list_tasks())
        return
    tasks, loss = choose(options["tasks"])
    if export is not None:
        _export(export, tasks, loss, options)
        return
    if options["model"] is None:
        raise InputError("--model is missing: a shipped name, a folder or file, or an address")
    _run(tasks, loss, options)


def list_tasks() -> str:
    """One line a task."""
    from rwkvx_evals.long.tasks import TASKS

    lines = {name: task.about for name, task in TASKS.items()} | {NAME: ABOUT}
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {about}" for name, about in lines.items())


def choose(text: str) -> tuple[dict[str, Task], bool]:
    """Tasks by name in the order of --list, and whether the loss by position is wanted too.

    Raises InputError: a name that is none, with those nearest to it.
    """
    from rwkvx_evals.long.tasks import TASKS, find_tasks

    names = [name for name in (part.strip() for part in text.split(",")) if name]
    if not names:
        raise InputError("--tasks names no task; --list shows them")
    found, loss = set[str](), False
    for name in names:
        if f"{NAME}_".startswith(f"{name}_"):
            loss = True
            continue
        if name not in TASKS and get_close_matches(name, [*TASKS, NAME], n=1) == [NAME]:
            raise InputError(f"unknown task {shown(name)}: did you mean {NAME}?")
        found |= {task.name for task in find_tasks([name])}
    return {name: task for name, task in TASKS.items() if name in found}, loss


def _export(folder: Path, tasks: dict[str, Task], loss: bool, options: dict[str, Any]) -> None:
    from rwkvx_evals.long.export import export
    from rwkvx_evals.models.open import open_tokenizer

    if options["tokenizer"] is None:
        raise InputError("--export needs --tokenizer world, bytes or a folder")
    if loss:
        raise InputError(f"{NAME} has no samples to export")
    data = data_folder(options["data"])
    export(
        folder, open_tokenizer(options["tokenizer"]), list(tasks.values()),
        parse_lengths(options["lengths"]), options["samples"], options["seed"],
        data=data, book=_book(options["haystack"], data),
    )  # fmt: skip
    click.echo(f"samples: {folder}")


def _run(tasks: dict[str, Task], loss: bool, options: dict[str, Any]) -> None:
    lengths, data = parse_lengths(options["lengths"]), data_folder(options["data"])
    # These take seconds to import: a wrong option should not wait for them.
    from rwkvx_evals.long.evaluate import Request, evaluate
    from rwkvx_evals.long.folder import whose
    from rwkvx_evals.long.plan import Settings
    from rwkvx_evals.long.work import own_device, processes
    from rwkvx_evals.long.writer import Writer
    from rwkvx_evals.models.open import Options, open_model

    dtype, chat = options["dtype"], options["chat_template"]
    model = open_model(
        options["model"],
        Options(
            own_device(options["device"]), dtype, options["tokenizer"], chat,
            options["max_length"], options["model_name"], options["timeout"],
            options["device_map"], options["trust_remote_code"],
        ),
    )  # fmt: skip
    settings = Settings(options["seed"], dtype, options["truncate"], chat)
    mine = whose(model.name, model.fingerprint(), settings)
    out = options["out"] or default_folder(mine)
    request = Request(
        tasks, lengths, options["samples"], settings, loss=loss, batch=options["batch"],
        share=not options["no_sharing"], concurrency=options["concurrency"],
        command=command_line(),
    )  # fmt: skip
    writer = Writer(
        model.tokenizer, seed=options["seed"], data=data, book=_book(options["haystack"], data)
    )
    rank, several = processes()
    results = evaluate(model, request, writer, out, quiet=rank > 0)
    if rank == 0:
        click.echo(summary(results))
        click.echo(f"report: {out / 'report.html'}")
    if warn_or_fail(results, loud=rank == 0):
        raise click.exceptions.Exit(1)


def _book(name: str | None, data: Path | None) -> Path | None:
    return None if name is None else find_haystack(name, data)


def summary(results: dict[str, Any]) -> str:
    """One line for each task and length."""
    lines = []
    for name, task in results["tasks"].items():
        for length, entry in task["lengths"].items():
            score = "no score" if entry["score"] is None else (
                f"{100 * entry['score']:5.1f} % ({100 * entry['low']:.0f} to "
                f"{100 * entry['high']:.0f})"
            )  # fmt: skip
            counts = ", ".join(f"{k} {entry[k]}" for k in ("asked", "scored", "failed", "skipped"))
            lines.append(f"{name:<20} {length_label(int(length)):>6}  {score}  {counts}")
    for length, entry in results.get(NAME, {}).get("lengths", {}).items():
        found = "no loss" if entry["loss"] is None else f"{entry['loss']:.4f} nats"
        lines.append(
            f"{NAME:<20} {length_label(int(length)):>6}  {found}  windows {entry['windows']}"
        )
    return "\n".join(lines)


def warn_or_fail(results: dict[str, Any], loud: bool = True) -> bool:
    """Says what has no answer; whether that is an error."""
    measured = list(results.get(NAME, {}).get("lengths", {}).values())
    groups = [results["total"], *measured]
    oom, invalid, error = (sum(g[kind] for g in groups) for kind in ("oom", "invalid", "error"))
    if loud:
        for warning in results["warnings"]:
            click.echo(f"warning: {warning}", err=True)
        if oom:
            click.echo(f"warning: {oom} samples ran out of memory", err=True)
        if invalid:
            click.echo(f"error: {invalid} samples gave not-a-number logits", err=True)
        if error:
            click.echo(f"error: {error} samples have no answer: the report says why", err=True)
    return bool(invalid or error)
