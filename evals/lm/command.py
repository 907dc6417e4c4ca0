"""`rwkvx eval lm`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rwkvx.cli.options import Within, device_option, dtype_option, model_option
from rwkvx.data.folder import data_folder
from rwkvx.ranges import COUNT, TOKENS, Whole
from rwkvx_evals.folder import default_folder, model_label
from rwkvx_evals.lm.settings import (
    Settings,
    read_limit,
    read_mapping,
    read_samples,
    read_seeds,
)

EXAMPLES = Whole(0, 1_000_000)


@click.command("lm")
@model_option
@click.option(
    "--tasks",
    default="lambada_openai,piqa",
    show_default=True,
    help="lm-eval's names of tasks, groups and tags, patterns, or YAML files.",
)
@click.option("--data", help="Folder with the tasks' data; default: RWKVX_DATA, else the hub.")
@click.option(
    "--include-path", "include", multiple=True, help="A folder of task definitions of your own."
)
@click.option("--num-fewshot", type=Within(EXAMPLES), help="Examples before each question.")
@click.option("--limit", help="Only the first items of each task: a number, or a share below 1.")
@click.option("--samples", help='Only these items: JSON, or a file of it: {"piqa": [0, 7]}.')
@click.option(
    "--batch",
    "--batch-size",
    "batch",
    type=Within(COUNT),
    help="Contexts read together at most; default: by device.",
)
@click.option(
    "--max-length", type=Within(TOKENS), help="Refuse longer requests; default: no limit."
)
@click.option(
    "--truncate",
    type=click.Choice(["left", "middle"]),
    help="Drop the start or the middle of contexts beyond --max-length instead of refusing.",
)
@click.option(
    "--apply-chat-template",
    "chat",
    is_flag=False,
    flag_value="true",
    help="Make prompts conversations, with the model's template, one of its templates by NAME, or "
    "a FILE of one.",
    metavar="[NAME|FILE]",
)
@click.option("--system-instruction", help="Text before everything else.")
@click.option(
    "--fewshot-as-multiturn/--fewshot-as-one-turn",
    "multiturn",
    default=None,
    help="Examples as turns of the conversation (with a template the default), or as one text.",
)
@click.option(
    "--gen-kwargs",
    multiple=True,
    help="Generation options in place of the tasks': do_sample=True,temperature=0.7, or JSON.",
)
@click.option(
    "--seed", default="0,1234,1234,1234", show_default=True,
    help="Of random, NumPy, torch (drawn texts) and the few-shot examples; or one for all.",
)  # fmt: skip
@click.option(
    "--metadata", multiple=True, help="For tasks that make their data: key=value or JSON."
)
@click.option("--log-samples", is_flag=True, help="Also write every item, request and answer.")
@click.option("--predict-only", is_flag=True, help="Only write answers; compute no metrics.")
@click.option("--confirm-run-unsafe-code", "unsafe", is_flag=True, help="Run what models write.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Default: runs/lm-MODEL-WEIGHTS-SETTINGS."
)
@device_option
@dtype_option
def lm_command(
    model: str,
    tasks: str,
    data: str | None,
    out: Path | None,
    device: str,
    dtype: str,
    batch: int | None,
    log_samples: bool,
    unsafe: bool,
    **options: Any,
) -> None:
    """Run lm-eval's own task definitions and metrics.

    A killed run goes on where it stopped when the same command is given again. Results also come
    in lm-eval's own format. `rwkvx lm-eval` runs lm-eval's own command with the same model.

    \b
    Examples:
      rwkvx eval lm --model passkey-tiny --tasks lambada_openai,piqa --data FOLDER
      rwkvx eval lm --model passkey-tiny --tasks arc_easy,boolq --num-fewshot 5 --limit 0.1
      rwkvx eval lm --model passkey-tiny --tasks mine.yaml --gen-kwargs max_gen_toks=64
    """
    folder = data_folder(data)
    settings = _settings(tasks, dtype, **options)
    # lm-eval takes seconds to import: a wrong option should not wait for it.
    from rwkvx_evals.lm.evaluate import evaluate, whose
    from rwkvx_evals.lm.load import load

    loaded = load(model, device, dtype)
    name = model_label(model)
    out = out or default_folder(whose(loaded, name, settings, folder))
    results = evaluate(
        loaded,
        name,
        settings,
        out,
        folder=folder,
        batch=batch,
        origin=model,
        log_samples=log_samples,
        unsafe_code=unsafe,
    )
    click.echo(summary(results))
    click.echo(f"report: {out / 'report.md'}   picture: {out / 'scores.png'}")
    _fail_for_missing_answers(results)


def _settings(
    tasks: str,
    dtype: str,
    *,
    include: tuple[str, ...],
    limit: str | None,
    samples: str | None,
    chat: str | None,
    multiturn: bool | None,
    gen_kwargs: tuple[str, ...],
    seed: str,
    metadata: tuple[str, ...],
    **same: Any,
) -> Settings:
    """The options of the command as they are meant; raises InputError for those that are not."""
    file = chat if chat is not None and Path(chat).expanduser().is_file() else None
    return Settings(
        tasks=tuple(name for name in (part.strip() for part in tasks.split(",")) if name),
        dtype=dtype,
        include=include,
        limit=None if limit is None else read_limit(limit),
        samples=None if samples is None else read_samples(samples),
        chat=chat is not None if chat in (None, "true", file) else chat or True,
        chat_file=file,
        fewshot_as_multiturn=multiturn,
        gen_kwargs=read_mapping("--gen-kwargs", gen_kwargs),
        seeds=read_seeds(seed),
        metadata=read_mapping("--metadata", metadata),
        **same,
    )


def _fail_for_missing_answers(results: dict[str, Any]) -> None:
    requests = results["requests"].values()
    if failed := sum(counts["failed"] for counts in requests):
        invalid = sum(counts["invalid"] for counts in requests)
        click.echo(
            f"error: {failed} requests have no answer ({invalid} with not-a-number logits, "
            f"{failed - invalid} out of memory): their tasks have no score",
            err=True,
        )
        raise click.exceptions.Exit(1)


def summary(results: dict[str, Any]) -> str:
    """One line per metric for the terminal, then what must be known beside them."""
    from rwkvx_evals.lm.report import remarks, uncertainty

    lines = []
    for row in results["table"]:
        value = "n/a" if row["value"] is None else f"{row['value']:.4f}"
        error = f" {uncertainty(row)}" if uncertainty(row) else ""
        lines.append(f"{row['task']:<20} {row['metric']:<12} {value}{error}  n = {row['n']}")
    return "\n".join([*lines, *(f"note: {line}" for line in remarks(results))])
