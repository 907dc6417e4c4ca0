"""`rwkvx eval passkey`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

import rwkvx
from rwkvx.cli.options import Within, device_option, dtype_option, model_option
from rwkvx.data.folder import data_folder
from rwkvx.ranges import COUNT
from rwkvx_evals.folder import claim, default_folder, model_label, owner
from rwkvx_evals.lengths import length_label, parse_lengths
from rwkvx_evals.long.sources import find_haystack
from rwkvx_evals.passkey.evaluate import evaluate
from rwkvx_evals.passkey.plan import DEPTHS, Settings, depth_values
from rwkvx_evals.passkey.report import Results, percent, uncertainty
from rwkvx_kernels.names import SELECTIONS


@click.command("passkey")
@model_option
@click.option(
    "--lengths", default="1k,4k,16k,64k", show_default=True, help="Exact token counts; 1k = 1024."
)
@click.option(
    "--depths",
    type=Within(DEPTHS),
    default=10,
    show_default=True,
    help="Positions of the key, 0 to 100 %.",
)
@click.option(
    "--seeds",
    type=Within(COUNT),
    default=5,
    show_default=True,
    help="Keys at each length and depth.",
)
@click.option("--haystack", help="A .txt or .xz file of prose in place of the standard filler.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Default: runs/passkey-MODEL-WEIGHTS-SETTINGS."
)
@click.option("--data", help="Data folder, to find --haystack in; default: RWKVX_DATA.")
@device_option
@dtype_option
@click.option("--selection", type=click.Choice(SELECTIONS), help="Default: the model's own.")
@click.option(
    "--batch", type=Within(COUNT), help="Samples read together at most; default: by memory."
)
@click.option("--max-new-tokens", type=Within(COUNT), default=16, show_default=True)
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
    overrides: dict[str, Any] = {"selection": selection} if selection else {}
    loaded = rwkvx.load(model, device=device, dtype=dtype, **overrides)
    whose = owner(
        "passkey", name, loaded.fingerprint(),
        {**asdict(settings), "haystack": file.name if file else None, "selection": selection},
    )  # fmt: skip
    out = out or default_folder(whose)
    claim(out, whose)
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
            f"{uncertainty(entry)}  asked {entry['asked']}, scored {entry['scored']}, "
            f"failed {entry['failed']}"
        )
    effective = results["effective_length"]
    lines.append(f"effective length: {'none' if effective is None else f'{effective:,} tokens'}")
    return "\n".join(lines)
