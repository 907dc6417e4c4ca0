"""A click group that imports a command only when it runs, so that ``--help`` stays quick."""

import importlib
from typing import Any

import click

from rwkvx.errors import InputError

__all__ = ["LazyGroup", "explain_missing_module"]

# Which extra of this package brings a module that the base installation lacks.
_EXTRAS = {
    "datasets": "eval",
    "lm_eval": "eval",
    "jinja2": "eval",
    "matplotlib": "eval",
    "openai": "eval",
    "tensorboard": "train",
    "triton": "gpu",
}


def explain_missing_module(error: ModuleNotFoundError) -> InputError:
    """What to install (or what is not written yet) for an import that failed."""
    name = error.name or str(error)
    root = name.partition(".")[0]
    if root in ("rwkvx", "rwkvx_evals", "rwkvx_kernels", "rwkvx_configs"):
        return InputError(f"this installation of rwkvx has no module {name}")
    extra = _EXTRAS.get(root)
    wanted = f"'rwkvx[{extra}]'" if extra else root
    return InputError(f"this needs the package {root}, which is missing: pip install {wanted}")


class LazyGroup(click.Group):
    """A group whose sub-commands are named by import path.

    Args:
        lazy: command name to (``"module:attribute"`` or a ready command, one-line help). The
            one-line help stands in the group's own ``--help``, which imports nothing.
    """

    def __init__(
        self, *args: Any, lazy: dict[str, tuple[str | click.Command, str]], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now; InputError where a module it needs is missing."""
        if cmd_name not in self.lazy:
            return None
        target = self.lazy[cmd_name][0]
        if isinstance(target, click.Command):
            return target
        module, _, attribute = target.partition(":")
        try:
            command: click.Command = getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            raise explain_missing_module(error) from error
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self.lazy.items()])
