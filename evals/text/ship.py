"""`rwkvx ship`: a trained model as it is shipped, measured and with its card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rwkvx.cli.options import Within
from rwkvx.data.folder import data_folder
from rwkvx.errors import InputError
from rwkvx.files import is_there, replacing_folder, user_path, write_json, write_text
from rwkvx.ranges import COUNT

TASKS = ("lambada_openai", "piqa")
LENGTH, ROWS = 4096, 16


@click.command("ship")
@click.argument("source")
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of reports.")
@click.option("--data", help="Data folder; default: RWKVX_DATA.")
@click.option("--limit", type=Within(COUNT), help="Items of each task; default: all.")
@click.option("--length", type=Within(COUNT), default=LENGTH, show_default=True)
@click.option("--rows", type=Within(COUNT), default=ROWS, show_default=True)
def ship_command(
    source: str,
    target: Path,
    out: Path,
    data: str | None,
    limit: int | None,
    length: int,
    rows: int,
) -> None:
    """Write the model SOURCE as TARGET in bfloat16, measure that, and put the scores on its card.

    LAMBADA, PIQA and, on War and Peace, loss by position. SOURCE is the model of a run, or one of
    its checkpoints. A killed run goes on where it stopped when the same command is given again.

    \b
    Examples:
      rwkvx ship runs/rwkvx_nano/rwkvx_nano-step-1500 rwkvx/models/rwkvx-nano --out runs/ship
    """
    import torch

    import rwkvx
    from rwkvx.checkpoint import folder as model_folder
    from rwkvx.checkpoint.load import find_model, read_checkpoint, with_adapter
    from rwkvx_evals.text.positions import as_lines, find_book, measure_book

    target, folder = user_path(target), data_folder(data)
    if is_there(target):
        raise InputError(f"{target} exists already: remove it or choose another name")
    if (book := find_book(folder)) is None:
        raise InputError("no War and Peace: name a folder that holds it with --data")
    path, beside = with_adapter(find_model(source), None)
    checkpoint = read_checkpoint(path, {}, dtype=torch.bfloat16, adapter=beside)
    small = out / "model"
    model_folder.write(checkpoint, small)  # what is measured is what is shipped
    model = rwkvx.load(small)
    scores = run_tasks(model, target.name, out / "lm", folder, limit)
    text = measure_book(model, book, length, rows)
    write_json(out / "positions.json", text)
    click.echo("\n".join(as_lines(text)))
    known = path / "README.md"
    card = known.read_text(encoding="utf-8") if known.is_file() else f"# {target.name}\n"
    with replacing_folder(target) as temporary:
        model_folder.write(checkpoint, temporary)
        write_text(temporary / "README.md", with_scores(card, scores, text))
    size = sum(p.stat().st_size for p in target.glob("*.safetensors")) / 2**20
    click.echo(f"{target}: {size:.1f} MiB of weights")


def run_tasks(
    model: Any, name: str, out: Path, folder: Path | None, limit: int | None
) -> list[dict[str, Any]]:
    """The table of `rwkvx eval lm`."""
    from rwkvx_evals.lm.command import summary
    from rwkvx_evals.lm.evaluate import evaluate
    from rwkvx_evals.lm.settings import Settings

    results = evaluate(model, name, Settings(TASKS, limit=limit), out, folder=folder)
    click.echo(summary(results))
    table: list[dict[str, Any]] = results["table"]
    return table


def with_scores(card: str, scores: list[dict[str, Any]], text: dict[str, Any]) -> str:
    """The card with a section of what was measured, before what it says of limits."""
    rows = [
        f"| {row['task']}, {row['metric']} | {_score(row)} | {_chance(row)} | {row['n']:,} |"
        for row in scores
        if row["value"] is not None
    ]
    bits = f"{text['bits_per_byte']:.3f} ± {text['bits_per_byte_stderr']:.3f}"
    rows.append(f"| bits per byte of {text['text']} | {bits} | 8 | {text['rows']} windows |")
    places = [
        f"| {x['from']:,} to {x['to']:,} | {x['loss']:.3f} ± {x['stderr']:.3f} |"
        for x in text["buckets"]
    ]
    section = "\n".join(
        [
            "## Measured",
            "",
            "As shipped, in bfloat16 (computed in float32), zero-shot by lm-eval; ± one standard",
            "error.",
            "",
            "| | | chance | items |\n|---|---|---|---|",
            *rows,
            "",
            f"Loss by position in windows of {text['length']:,} tokens (nats a token):",
            "",
            "| position | loss |\n|---|---|",
            *places,
        ]
    )
    before, limits, after = card.partition("## Limits")
    return f"{before.rstrip()}\n\n{section}\n\n{limits}{after}".rstrip() + "\n"


def _score(row: dict[str, Any]) -> str:
    error = f" ± {row['stderr']:.4f}" if row["stderr"] else ""
    return f"{row['value']:.4f}{error}"


def _chance(row: dict[str, Any]) -> str:
    return "" if row["chance"] is None else f"{row['chance']:g}"
