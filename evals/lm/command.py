"""`rwkvx eval lm`."""

from __future__ import annotations

from pathlib import Path

import click

import rwkvx
from rwkvx.cli.options import Within, device_option, dtype_option, model_option
from rwkvx.data.folder import data_folder
from rwkvx.errors import InputError
from rwkvx.ranges import COUNT, TOKENS
from rwkvx_evals.lm.report import Results


@click.command("lm")
@model_option
@click.option("--tasks", default="lambada_openai,piqa", show_default=True, help="lm-eval's names.")
@click.option("--data", help="Folder with the tasks' data; default: RWKVX_DATA, else the hub.")
@click.option("--limit", type=Within(TOKENS), help="Only the first items of each task.")
@click.option(
    "--batch",
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
@click.option("--out", type=click.Path(path_type=Path), help="Default: runs/lm-MODEL.")
@device_option
@dtype_option
def lm_command(
    model: str,
    tasks: str,
    data: str | None,
    limit: int | None,
    batch: int | None,
    max_length: int | None,
    truncate: str | None,
    out: Path | None,
    device: str,
    dtype: str,
) -> None:
    """Run lm-eval's own task definitions and metrics.

    A killed run goes on where it stopped when the same command is given again.

    \b
    Example:
      rwkvx eval lm --model passkey-tiny --tasks lambada_openai,piqa --data FOLDER
    """
    names = [name for name in (part.strip() for part in tasks.split(",")) if name]
    if not names:
        raise InputError("--tasks names no task")
    folder = data_folder(data)
    # lm-eval takes seconds to import: a wrong option should not wait for it.
    from rwkvx_evals.lm.evaluate import evaluate

    loaded = rwkvx.load(model, device=device, dtype=dtype)
    label = Path(model).name or model
    out = out or Path("runs") / f"lm-{label}"
    results = evaluate(
        loaded,
        label,
        names,
        out,
        folder=folder,
        limit=limit,
        batch=batch,
        max_length=max_length,
        truncate=truncate,
        dtype=dtype,
    )
    click.echo(summary(results))
    click.echo(f"report: {out / 'report.md'}   picture: {out / 'scores.png'}")
    requests = results["requests"].values()
    if failed := sum(counts["failed"] for counts in requests):
        invalid = sum(counts["invalid"] for counts in requests)
        click.echo(
            f"error: {failed} requests have no answer ({invalid} with not-a-number logits, "
            f"{failed - invalid} out of memory)",
            err=True,
        )
        raise click.exceptions.Exit(1)


def summary(results: Results) -> str:
    """One line per metric for the terminal."""
    lines = []
    for row in results["table"]:
        value = "n/a" if row["value"] is None else f"{row['value']:.4f}"
        error = "" if row["stderr"] is None else f" ± {row['stderr']:.4f}"
        lines.append(f"{row['task']:<20} {row['metric']:<12} {value}{error}  n = {row['n']}")
    return "\n".join(lines)
