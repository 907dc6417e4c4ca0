"""``rwkvx convert``: a checkpoint in another format, or with sparse blocks added."""

from pathlib import Path

import click

from rwkvx.cli.options import Within
from rwkvx.config import ModelConfig
from rwkvx.dtypes import FLOATS
from rwkvx.ranges import COUNT, range_of

__all__ = ["convert_command"]


@click.command("convert")
@click.argument("source")
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--to",
    type=click.Choice(["folder", "pth", "fla", "ggml"]),
    help="Format of TARGET. Default: pth for a name that ends in .pth, ggml for .bin, else folder.",
)
@click.option(
    "--dtype",
    type=click.Choice(FLOATS),
    help="Default: every tensor keeps its own.",
)
@click.option(
    "--expand",
    type=Within(COUNT),
    metavar="M",
    help="Add M blocks to RWKV-7, one after every L/M.",
)
@click.option("--kind", default="sparse", show_default=True, help="Of the blocks that are added.")
@click.option(
    "--init",
    type=click.Choice(["zero", "copy"]),
    default="zero",
    show_default=True,
    help="New blocks: zero puts out nothing, so that the function stays the same (checked); copy "
    "takes the projections of the block before, as the training code of RWKV-X does.",
)
@click.option(
    "--chunk-size",
    type=Within(range_of(ModelConfig, "chunk_size")),
    help="Of sparse blocks. Default: SOURCE's, else 2048.",
)
@click.option(
    "--topk",
    type=Within(range_of(ModelConfig, "topk")),
    help="Of sparse blocks. Default: SOURCE's, else 3.",
)
@click.option(
    "--adapter",
    type=click.Path(path_type=Path),
    help="Add the low-rank updates of this adapter of SOURCE to the weights.",
)
@click.option("--verify", is_flag=True, help="Check the checksums of SOURCE first.")
def convert_command(
    source: str,
    target: Path,
    to: str | None,
    dtype: str | None,
    expand: int | None,
    kind: str,
    init: str,
    chunk_size: int | None,
    topk: int | None,
    adapter: Path | None,
    verify: bool,
) -> None:
    """Write the model SOURCE as TARGET, bit for bit, in another format.

    SOURCE is whatever loads: a folder of rwkvx, a .pth of RWKV-7 (BlinkDL) or RWKV-X, a Hugging
    Face folder of flash-linear-attention's RWKV7, a ggml file of rwkv.cpp, a shipped name.

    \b
    Examples:
      rwkvx convert RWKV-X-0.2B-64k-Base.pth my-model
      rwkvx convert my-model my-model.pth
      rwkvx convert rwkv7-g1-0.1b.pth hybrid --expand 4
      rwkvx convert rwkv7-g1-0.1b.pth hf-model --to fla
      rwkvx convert my-model my-chat-model --adapter runs/chat/chat-step-500
    """
    import torch

    from rwkvx.checkpoint.expand import assert_same_function
    from rwkvx.checkpoint.expand import expand as add_blocks
    from rwkvx.checkpoint.formats import format_of_target
    from rwkvx.checkpoint.load import find_model, read_checkpoint, with_adapter
    from rwkvx.errors import InputError, one_line
    from rwkvx.files import is_there, user_path

    target = user_path(target)
    if is_there(target):
        raise InputError(f"{target} exists already: remove it or choose another name")
    wanted = format_of_target(target, to)
    asked = {"chunk_size": chunk_size, "topk": topk}
    overrides = {name: value for name, value in asked.items() if value is not None}
    path, beside = with_adapter(find_model(source), adapter, verify)
    if beside is not None and beside.config.kind == "state":
        raise InputError(
            f"{beside.origin} is a starting state: no weight, it stays beside its model (--adapter "
            "of `rwkvx generate`, adapter= of `rwkvx.load`)"
        )
    wide = getattr(torch, dtype) if dtype else None
    checkpoint = read_checkpoint(path, overrides, verify, wide, beside)
    if expand is not None:
        before = checkpoint
        checkpoint = add_blocks(before, expand, init, kind)
        if init == "zero":
            assert_same_function(before, checkpoint)
            click.echo("checked: the function is that of SOURCE, logit for logit")
    note = wanted.write(checkpoint, target)
    count = sum(x.numel() for x in checkpoint.tensors.values())
    click.echo(f"{target}: {wanted.TITLE}, {count:,} parameters")
    for line in (note or "").splitlines():
        click.echo(one_line(f"note: {line}"), err=True)
