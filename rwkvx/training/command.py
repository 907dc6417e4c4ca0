"""`rwkvx train`."""

from pathlib import Path

import click

from rwkvx.errors import InputError, shown
from rwkvx.training.config import field_names, read_config

EPILOG = """Example: rwkvx train configs/passkey_tiny.yaml --seed 1 --optimizer.lr 2e-3

Fields are those of the YAML file, nested ones with dots, values in YAML syntax. A run that was
stopped goes on from its last checkpoint when the same command is given again."""


@click.command(
    "train",
    epilog=EPILOG,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    options_metavar="[--data FOLDER] [--FIELD VALUE]...",
)
@click.argument("config")
@click.option("--data", help="Folder of text data (default: the variable RWKVX_DATA).")
@click.pass_context
def train_command(context: click.Context, config: str, data: str | None) -> None:
    """Train a model as the YAML file CONFIG says (a path, or the name of a shipped config)."""
    if config.startswith("--"):
        raise click.UsageError(f"CONFIG comes before the fields, got {config}")
    overrides = _overrides(context.args)
    settings = read_config(find_config(config), overrides)
    from rwkvx.training.trainer import Trainer

    Trainer(settings, data).run()
    click.echo(f"saved {settings.folder / 'model'}")


def find_config(name: str) -> str:
    """A path as it is; a bare name is looked up among the shipped configs.

    Raises:
        InputError: neither is there.
    """
    from importlib.resources import files

    if "/" in name or Path(name).exists():
        return name
    folder = files("rwkvx_configs")
    shipped = folder / f"{name.removesuffix('.yaml')}.yaml"
    if not shipped.is_file():
        known = sorted(x.name.removesuffix(".yaml") for x in folder.iterdir() if ".yaml" in x.name)
        raise InputError(f"no config {shown(name)}: not a file, nor shipped ({', '.join(known)})")
    return str(shipped)


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
            raise click.UsageError(f"no field {word}; fields: {', '.join(sorted(known))}")
        if not equals:
            if not rest:
                raise click.UsageError(f"--{name} needs a value")
            value = rest.pop(0)
        found[name] = value
    return found
