"""Types of options that all commands share: ranges that are checked before anything else."""

from collections.abc import Callable
from typing import Any

import click

from rwkvx.dtypes import DTYPES
from rwkvx.errors import shown
from rwkvx.ranges import SEED, Each, Range

__all__ = ["Within", "device_option", "dtype_option", "model_option", "seed_option"]

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class Within(click.ParamType):
    """A value of a range of `rwkvx.ranges`; anything else is bad usage, in one line."""

    def __init__(self, hold: Range) -> None:
        self.hold = hold
        self.name = "list" if isinstance(hold, Each) else type(hold).__name__.lower()

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The value that a text spells; defaults are values already."""
        try:
            found = self.hold.parse(value) if isinstance(value, str) else value
        except ValueError:
            found = value
        if not self.hold.holds(found):
            self.fail(f"must be {self.hold.words}, got {shown(found)}", param, ctx)
        return found


device_option: Decorator = click.option(
    "--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda, cuda:1, mps."
)
dtype_option: Decorator = click.option(
    "--dtype", type=click.Choice(DTYPES), default="float32", show_default=True
)
model_option: Decorator = click.option(
    "--model", required=True, metavar="M", help="A shipped name, a folder, or a checkpoint file."
)
seed_option: Decorator = click.option(
    "--seed", type=Within(SEED), help="For the same continuation again."
)
