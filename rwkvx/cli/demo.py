"""``rwkvx demo``: the main job on the shipped models, from retrieval to public tasks."""

import time
from pathlib import Path
from typing import Any

import click

from rwkvx.errors import InputError

__all__ = ["demo_command"]

LENGTHS, DEPTHS, SEEDS = "1k,4k,16k,64k", 10, 5
QUICK_LENGTHS, QUICK_DEPTHS, QUICK_SEEDS, QUICK_ITEMS = "1k,4k", 5, 2, 100
TASKS = ("lambada_openai", "piqa")
TEXT_MODEL = "rwkvx-nano"
TEXT_TOKENS, TEXT_ROWS, QUICK_TEXT_TOKENS, QUICK_TEXT_ROWS = 4096, 16, 1024, 4


@click.command("demo")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True
)
@click.option("--data", help="Folder with LAMBADA and PIQA; default: RWKVX_DATA, else the hub.")
@click.option("--quick", is_flag=True, help="Shorter prompts, and 100 items of each task.")
@click.option("--model", default="passkey-tiny", show_default=True, help="Shipped name or folder.")
@click.option("--text-model", help=f"For text, as --model. Default: {TEXT_MODEL} if it is shipped.")
def demo_command(
    out: Path, data: str | None, quick: bool, model: str, text_model: str | None
) -> None:
    """The main job: find a passkey in up to 64K tokens, then read English.

    English is LAMBADA and PIQA by lm-eval, and the loss by position on War and Peace.

    Writes reports and pictures. A killed run goes on where it stopped when it is started again.

    \b
    Examples:
      rwkvx demo
      rwkvx demo --quick --data DATA_FOLDER --out /tmp/demo
    """
    import rwkvx
    from rwkvx.data.folder import data_folder
    from rwkvx.shipped import shipped_models

    began = time.perf_counter()
    folder = data_folder(data)  # a folder that is not there is said before anything else
    loaded = rwkvx.load(model)
    name = Path(model).name
    wrong = run_passkey(loaded, name, out / "passkey", quick)
    if text_model is None and TEXT_MODEL in shipped_models():
        text_model = TEXT_MODEL
    if text_model is not None:
        loaded, name = rwkvx.load(text_model), Path(text_model).name
    # Results of all items and of the first few belong into folders of their own.
    wrong += run_tasks(loaded, name, out / ("lm-quick" if quick else "lm"), folder, quick)
    if text_model is not None:
        run_positions(loaded, name, out / ("text-quick" if quick else "text"), folder, quick)
    click.echo(f"\ndone in {minutes(time.perf_counter() - began)}")
    if wrong:
        raise InputError(f"{wrong} samples have no answer: see the reports")


def run_passkey(model: Any, name: str, out: Path, quick: bool) -> int:
    """Passkey retrieval as `rwkvx eval passkey` runs it; how many samples have no answer."""
    from rwkvx_evals.lengths import parse_lengths
    from rwkvx_evals.passkey.command import summary
    from rwkvx_evals.passkey.evaluate import evaluate
    from rwkvx_evals.passkey.plan import Settings, depth_values

    lengths, depths, seeds = LENGTHS, DEPTHS, SEEDS
    if quick:
        lengths, depths, seeds = QUICK_LENGTHS, QUICK_DEPTHS, QUICK_SEEDS
    click.echo(f"Passkey retrieval: {name} at {lengths} tokens, {depths} depths × {seeds} keys")
    settings = Settings(parse_lengths(lengths), depth_values(depths), seeds, 16, "float32")
    results = evaluate(model, name, settings, out)
    click.echo(summary(results))
    click.echo(f"report: {out / 'report.md'}   picture: {out / 'heatmap.png'}")
    return int(results["total"]["failed"])


def run_tasks(model: Any, name: str, out: Path, folder: Path | None, quick: bool) -> int:
    """The tasks as `rwkvx eval lm` runs them; how many requests have no answer.

    Data that cannot be had ends in one line that says how to get it.
    """
    from rwkvx_evals.lm.command import summary
    from rwkvx_evals.lm.evaluate import evaluate
    from rwkvx_evals.lm.settings import Settings
    from rwkvx_evals.lm.tasks import MissingDataError

    items = f"the first {QUICK_ITEMS} items" if quick else "all items"
    click.echo(f"\nlm-eval: {name} on {', '.join(TASKS)}, {items}")
    settings = Settings(TASKS, limit=QUICK_ITEMS if quick else None)
    try:
        results = evaluate(model, name, settings, out, folder=folder)
    except MissingDataError as error:
        click.echo(f"left out: {error}")
        return 0
    click.echo(summary(results))
    click.echo(f"report: {out / 'report.md'}   picture: {out / 'scores.png'}")
    return sum(counts["failed"] for counts in results["requests"].values())


def run_positions(model: Any, name: str, out: Path, folder: Path | None, quick: bool) -> None:
    """Loss by position, as `rwkvx ship` measures it."""
    from rwkvx.files import write_json
    from rwkvx_evals.text.positions import BOOK, as_lines, find_book, measure_book

    if (book := find_book(folder)) is None:
        click.echo(f"left out: loss by position; name a folder that holds {BOOK}")
        return
    length, rows = (QUICK_TEXT_TOKENS, QUICK_TEXT_ROWS) if quick else (TEXT_TOKENS, TEXT_ROWS)
    click.echo(f"\nLoss by position: {name} on {book.name}")
    found = measure_book(model, book, length, rows)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "positions.json", {"model": name, **found})
    click.echo("\n".join(as_lines(found)))


def minutes(seconds: float) -> str:
    """75 → "1 min 15 s"."""
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"
