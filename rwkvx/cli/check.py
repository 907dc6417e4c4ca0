"""``rwkvx check``: every route that this machine has, against the equations."""

from typing import Any

import click

from rwkvx.cli.options import Within, device_option
from rwkvx.ranges import Whole

__all__ = ["check_command"]

# Chunks and windows of the check: a short text then has something to choose from.
CHUNK, WINDOW = 16, 24


@click.command("check")
@click.argument("model")
@click.option("--tokens", type=Within(Whole(3, 4096)), default=96, show_default=True)
@click.option("--seed", type=Within(Whole(0, 2**32)), default=0, show_default=True)
@device_option
def check_command(model: str, tokens: int, seed: int, device: str) -> None:
    """Compare all ways of running MODEL with the published equations, written out in numpy.

    Reference, torch, compiled and Triton implementations; whole, in parts and token by token; on
    random tokens, with chunks of 16 tokens and windows of 24, so that a short text has something
    to choose from. Fails when one of them errs more than four times as much as the reference.

    \b
    Examples:
      rwkvx check passkey-tiny
      rwkvx check my-model --device cuda
    """
    import rwkvx
    from rwkvx.check import check
    from rwkvx.errors import InputError

    loaded = rwkvx.load(model, device, "float32")
    config = loaded.config
    smaller: dict[str, Any] = {"chunk_size": min(CHUNK, config.chunk_size)}
    if "window" in config.options:
        smaller["window"] = min(WINDOW, config.option("window"))
    loaded = rwkvx.load(model, device, "float32", **smaller)
    click.echo(f"{'impl':<10} {'dtype':<8} {'reading':<34} {'error':>9} {'allowed':>9}")
    failed = 0
    for row in check(loaded, tokens, seed):
        error = "not here" if row.error is None else f"{row.error:.1e}"
        verdict = row.why if row.error is None else "" if row.passed else "WRONG"
        line = f"{row.impl:<10} {row.dtype:<8} {row.reading:<34} {error:>9} {row.allowed:>9.1e}"
        click.echo(f"{line}  {verdict}".rstrip())
        failed += not row.passed
    if failed:
        raise InputError(f"{failed} routes do not compute the equations of {model}")
