"""`rwkvx eval passkey`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import rwkvx
from rwkvx.config import SELECTIONS
from rwkvx.data.folder import data_folder
from rwkvx_evals.lengths import length_label, parse_lengths
from rwkvx_evals.passkey.evaluate import evaluate, find_haystack
from rwkvx_evals.passkey.plan import Settings, depth_values
from rwkvx_evals.passkey.report import Results, percent


def model_label(model: str) -> str:
    """The name of a model in reports and folder names: a shipped name, or the file's own."""
    return Path(model).name or model


@click.command("passkey")
@click.option("--model", required=True, help="A shipped name, a folder, or a checkpoint file.")
@click.option(
    "--lengths", default="1k,4k,16k,64k", show_default=True, help="Exact token counts; 1k = 1024."
)
@click.option("--depths", default=10, show_default=True, help="Positions of the key, 0 to 100 %.")
@click.option("--seeds", default=5, show_default=True, help="Keys at each length and depth.")
@click.option("--haystack", help="A .txt or .xz file of prose in place of the standard filler.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Default: runs/passkey-MODEL[-TEXT][-SELECTION]."
)
@click.option("--data", help="Data folder, to find --haystack in; default: RWKVX_DATA.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--selection", type=click.Choice(SELECTIONS), help="Default: the model's own.")
@click.option("--batch", type=int, help="Samples read together at most; default: by memory.")
@click.option("--max-new-tokens", default=16, show_default=True)
def passkey_command(
    model: str,
    lengths: str,
    depths: int,
    seeds: int,
    haystack: str | None,
    out: Path | None,
    data: str | None,
    device: str,
    dtype: str,
    selection: str | None,
    batch: int | None,
    max_new_tokens: int,
) -> None:
    """Ask for a key hidden at every depth of long prompts.

    A killed run goes on where it stopped when the same command is given again.

    \b
    Examples:
      rwkvx eval passkey --model passkey-tiny --lengths 1k,4k,16k,64k --depths 10 --seeds 5
      rwkvx eval passkey --model passkey-tiny --lengths 1k,4k --haystack book.txt
      rwkvx eval passkey --model passkey-tiny --lengths 256k,1m --selection coarse_to_fine
    """
    folder = data_folder(data)
    file = find_haystack(haystack, folder) if haystack else None
    settings = Settings(parse_lengths(lengths), depth_values(depths), seeds, max_new_tokens, dtype)
    name = model_label(model)
    if out is None:
        text = f"-{file.name.split('.')[0]}" if file else ""
        text += f"-{selection}" if selection else ""
        out = Path("runs") / f"passkey-{name}{text}"
    overrides: dict[str, Any] = {"selection": selection} if selection else {}
    loaded = rwkvx.load(model, device=device, dtype=dtype, **overrides)
    results = evaluate(loaded, name, settings, out, haystack=file, batch=batch)
    click.echo(summary(results))
    click.echo(f"report: {out / 'report.md'}   picture: {out / 'heatmap.png'}")
    total = results["total"]
    if total["oom"]:
        click.echo(f"warning: {total['oom']} samples ran out of memory", err=True)
    if total["invalid"]:
        click.echo(f"error: {total['invalid']} samples gave not-a-number logits", err=True)
        raise click.exceptions.Exit(1)


def summary(results: Results) -> str:
    """One line per length for the terminal."""
    lines = []
    for entry in results["lengths"]:
        lines.append(
            f"{length_label(entry['length']):>6}  {percent(entry['accuracy']):>8} "
            f"± {percent(entry['stderr'])}  asked {entry['asked']}, scored {entry['scored']}, "
            f"failed {entry['failed']}"
        )
    effective = results["effective_length"]
    lines.append(f"effective length: {'none' if effective is None else f'{effective:,} tokens'}")
    return "\n".join(lines)
