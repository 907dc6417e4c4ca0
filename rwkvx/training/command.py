"""`rwkvx train`."""

import sys

import click

from rwkvx.data.folder import data_folder
from rwkvx.errors import InputError, shown
from rwkvx.settings import nearest
from rwkvx.shipped import find_config, shipped_configs
from rwkvx.training.config import TrainConfig, field_names, read_config

EPILOG = """Examples:

\b
  rwkvx train passkey_tiny --data FOLDER
  rwkvx train my.yaml --seed 1 --optimizer.lr 2e-3 --data.paths "[a.txt, b.txt]"
  rwkvx train --show-config > my.yaml      every field, to be edited
  rwkvx train my.yaml --dry-run
  torchrun --nproc-per-node 8 -m rwkvx train my.yaml --device cuda --parallel fsdp

Fields are those of the YAML file, nested ones with dots, values in YAML syntax. A run that was
stopped (Ctrl-C, SIGTERM, a crash) goes on from its last checkpoint when the same command is given
again; with more steps, it is extended."""


@click.command(
    "train",
    epilog=EPILOG,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    options_metavar="[OPTIONS] [--FIELD VALUE]...",
)
@click.argument("config", required=False)
@click.option("--data", help="Folder of text data (default: the variable RWKVX_DATA).")
@click.option(
    "--show-config",
    is_flag=True,
    help="Print the run, every field spelled out; without CONFIG, one to begin from.",
)
@click.option("--dry-run", is_flag=True, help="Print what the run takes: memory, time, disk.")
@click.option(
    "--resume-anyway",
    is_flag=True,
    help="Go on with the folder's run although the config has changed; the change is recorded.",
)
@click.pass_context
def train_command(
    context: click.Context,
    config: str | None,
    data: str | None,
    show_config: bool,
    dry_run: bool,
    resume_anyway: bool,
) -> None:
    """Train a model as the YAML file CONFIG says (a path, or the name of a shipped config)."""
    named = config is not None and not config.startswith("--")
    if show_config and not named:
        from rwkvx.training.example import example_run

        words = [*([] if config is None else [config]), *context.args]
        click.echo(example_run(_overrides(words)), nl=False)
        return
    if config is None:
        raise click.UsageError("Missing argument 'CONFIG': --show-config prints one to begin from")
    if not named:
        raise click.UsageError(f"CONFIG comes before the fields, got {config}")
    if (path := find_config(config)) is None:
        known = ", ".join(shipped_configs())
        raise InputError(f"no config {shown(config)}: neither a .yaml file nor shipped ({known})")
    settings = read_config(path, _overrides(context.args))
    data_folder(data)  # one that is not there is said even where nothing of it is read
    if show_config:
        import yaml

        click.echo(yaml.safe_dump(settings.to_dict(), sort_keys=False, width=100), nl=False)
        return
    if dry_run:
        _show_plan(settings)
        return
    from rwkvx.training.distributed import joined
    from rwkvx.training.stopping import Stopped
    from rwkvx.training.trainer import Trainer

    with joined(settings.device, settings.sequence_parallel) as (world, device):
        trainer = Trainer(settings, data, world, device)
        try:
            trainer.run(resume_anyway)
        except Stopped as stopped:
            if world.first:
                click.echo(str(stopped), err=True)
            sys.exit(128 + stopped.signal)
        if world.first:
            click.echo(f"saved {trainer.folder.model(settings.name, trainer.step)}")


def _show_plan(config: TrainConfig) -> None:
    from rwkvx.training.plan import fits, make_plan, measure, report

    plan = make_plan(config)
    sample = measure(config) if fits(config, plan) else None
    rows = report(config, plan, sample)
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        click.echo(f"{name:<{width}}  {text}")


def _overrides(arguments: list[str]) -> dict[str, str]:
    """["--steps", "10", "--optimizer.lr=1e-3"] as a mapping.

    Raises:
        click.UsageError: no such field, or a field without a value.
    """
    known, found, rest = set(field_names()), {}, list(arguments)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        inner = name.partition(".")[0] in ("data", "stages")  # checked where they are read
        if not word.startswith("--") or not (name in known or inner):
            like = nearest(name, known)
            raise click.UsageError(
                f"no field {shown(word)}{like or '; fields: ' + ', '.join(sorted(known))}"
            )
        if not equals:
            if not rest:
                raise click.UsageError(f"--{name} needs a value")
            value = rest.pop(0)
        found[name] = value
    return found
