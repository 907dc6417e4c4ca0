"""`rwkvx eval compare`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("compare")
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path))
def compare_command(folders: tuple[Path, ...], out: Path) -> None:
    """What finished runs of eval long answer differently.

    Every run is compared with the first, sample by sample, with standard errors of the paired
    differences: two models, or two checkpoints of one.

    \b
    Example:
      rwkvx eval compare runs/long-A-1234abcd runs/long-B-5678ef01 --out runs/a-b
    """
    from rwkvx_evals.compare.pairs import compare, read_runs
    from rwkvx_evals.compare.report import summary, write_comparison
    from rwkvx_evals.files import write_json

    runs = read_runs(folders)
    parts = [compare(runs[0], run) for run in runs[1:]]
    write_comparison(runs, parts, out)
    named = [{"folder": str(r.folder), "label": r.label, "weights": r.results["weights"]}
             for r in runs]  # fmt: skip
    pairs = zip(runs[1:], parts, strict=True)
    found = [{"run": run.label, "differences": rows} for run, rows in pairs]
    write_json(out / "compare.json", {"runs": named, "base": runs[0].label, "compared": found})
    click.echo(summary(runs, parts))
    click.echo(f"report: {out / 'compare.html'}")
