"""``rwkvx convert``: reserved for converting checkpoints between layouts."""

import click

from rwkvx.errors import InputError

__all__ = ["convert_command"]


@click.command("convert")
@click.argument("source", required=False)
@click.argument("target", required=False)
def convert_command(source: str | None, target: str | None) -> None:
    """Convert a checkpoint to rwkvx's own folder. Not there yet.

    \b
    Example (of a later version):
      rwkvx convert RWKV-X-0.2B-64k-Base.pth my-model/
    """
    raise InputError(
        "`rwkvx convert` is not there yet; "
        "`rwkvx.load` and every --model option read the RWKV-X .pth layout directly"
    )
