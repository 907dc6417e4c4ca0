"""`rwkvx variants`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rwkvx.cli.options import Within
from rwkvx.data.folder import data_folder
from rwkvx.errors import InputError
from rwkvx.ranges import COUNT, SEED, Each, Whole
from rwkvx.shipped import find_config
from rwkvx.training.config import read_config


@click.command("variants")
@click.argument("config")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/variants"))
@click.option("--data", help="Data folder; default: RWKVX_DATA.")
@click.option("--steps", type=Within(Whole(0, 10**9)), default=0, help="Fewer than CONFIG says.")
@click.option("--seeds", type=Within(Each(SEED, 1, 20)), default="0", show_default=True)
@click.option("--factor", type=Within(COUNT), default=8, show_default=True,
              help="Measure at up to so many times the training length.")  # fmt: skip
@click.option("--rows", type=Within(COUNT), default=16, show_default=True, help="Windows of text.")
@click.option("--depths", type=Within(COUNT), default=5, show_default=True)
@click.option("--keys", type=Within(COUNT), default=4, show_default=True, help="At each depth.")
@click.option("--limit", type=Within(COUNT), help="LAMBADA items; default: all.")
def variants_command(
    config: str,
    out: Path,
    data: str | None,
    steps: int,
    seeds: Any,
    factor: int,
    rows: int,
    depths: int,
    keys: int,
    limit: int | None,
) -> None:
    """Train RWKV-7 alone, a hybrid without and with a key convolution, and dense attention, alike.

    CONFIG is the training config of a hybrid. Each run goes on where it stopped, and what was
    measured stays, when the same command is given again.

    \b
    Examples:
      rwkvx variants rwkvx_nano --steps 1500 --out runs/variants
    """
    from rwkvx_evals.text.positions import find_book
    from rwkvx_evals.variants.measure import Sizes, measure
    from rwkvx_evals.variants.report import write_report
    from rwkvx_evals.variants.runs import shortened, train, variants

    folder = data_folder(data)
    if (path := find_config(config)) is None:
        raise InputError(f"no config {config!r}: neither a .yaml file nor shipped")
    if (book := find_book(folder)) is None:
        raise InputError("no War and Peace: name a folder that holds it with --data")
    base = shortened(read_config(path), steps)
    trained = max(stage.length for stage in base.stages)
    lengths = tuple(n for n in _doubled(trained, factor) if n >= 256)
    sizes = Sizes(trained * factor, rows, lengths, depths, keys, limit)
    found: dict[str, dict[int, Any]] = {}
    for seed in seeds:
        for name, run in variants(base, out, seed).items():
            click.echo(f"{name}, seed {seed}")
            model = train(run, data)
            place = out / f"{name}-seed-{seed}" / "measured"
            found.setdefault(name, {})[seed] = measure(model, name, place, book, folder, sizes)
            write_report(found, trained, out)
    click.echo(f"report: {out / 'report.md'}   picture: {out / 'comparison.png'}")


def _doubled(length: int, factor: int) -> list[int]:
    return [length << i for i in range(factor.bit_length()) if length << i <= length * factor]
