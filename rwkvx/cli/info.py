"""``rwkvx info``: what a model is made of, from its config and tensor headers alone."""

from pathlib import Path
from typing import Any

import click

from rwkvx.checkpoint.checkpoint import check_vocabulary
from rwkvx.checkpoint.formats import detect
from rwkvx.checkpoint.load import find_model
from rwkvx.checkpoint.sidecar import read_sidecar, sidecar_of
from rwkvx.cli.options import Within
from rwkvx.config import ModelConfig
from rwkvx.costs import state_memory
from rwkvx.errors import InputError
from rwkvx.kinds import kind_of
from rwkvx.ranges import COUNT
from rwkvx.shipped import shipped_models

__all__ = ["info_command"]


def size(number: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.2f} GiB"


def shape_of_pattern(pattern: tuple[str, ...]) -> str:
    """``3 rwkv7, 1 sparse, 3 rwkv7, 1 sparse`` for a pattern, equal neighbours counted."""
    runs: list[tuple[str, int]] = []
    for kind in pattern:
        count = runs.pop()[1] if runs and runs[-1][0] == kind else 0
        runs.append((kind, count + 1))
    return ", ".join(f"{count} {kind}" for kind, count in runs)


def vocabulary(config: ModelConfig, tokenizer: Any) -> str:
    """Rows of the embedding and the tokenizer, and whether they fit."""
    try:
        check_vocabulary(config, "not to be loaded", tokenizer)
    except InputError as error:
        return str(error)
    return f"{config.vocab_size}, tokenizer {config.tokenizer or 'unknown'}"


def describe(path: Path) -> list[tuple[str, str]]:
    """Rows of the table that ``rwkvx info`` prints; no weight is read."""
    found = detect(path)
    config, tensors, tokenizer = found.read(path, {}, True)
    rows = [
        ("model", str(path)),
        ("format", found.TITLE),
        ("blocks", f"{len(config.pattern)}: {shape_of_pattern(config.pattern)}"),
        ("width", f"{config.width}, {config.heads} heads of {config.head_size}"),
        ("vocabulary", vocabulary(config, tokenizer)),
    ]
    for kind in dict.fromkeys(config.pattern):
        rows.append((f"{kind} blocks", kind_of(kind).describe(config)))
    if kept := read_sidecar(path):
        rows.append(("told by", f"{sidecar_of(path)}: {', '.join(kept)}"))
    kinds = sorted({str(x.dtype).removeprefix("torch.") for x in tensors.values()})
    stored = sum(x.numel() * x.element_size() for x in tensors.values())
    rows += [
        ("parameters", f"{sum(x.numel() for x in tensors.values()):,}"),
        ("weights", f"{size(stored)}, {', '.join(kinds)}"),
    ]
    memory = state_memory(config)
    constant = sum(block.constant for block in memory)
    growing = sum(block.per_token for block in memory if block.most is None)
    rows.append(("state", f"{size(constant)} + {growing:,.0f} B per token (float32)"))
    at = ((name, sum(block.at(n) for block in memory)) for name, n in _LENGTHS)
    rows.append(("state at", ", ".join(f"{name}: {size(total)}" for name, total in at)))
    return rows


_LENGTHS = (("16K", 2**14), ("64K", 2**16), ("1M", 2**20))


@click.command("info")
@click.argument("model", required=False)
@click.option("--verify", is_flag=True, help="Check the checksums too, which reads everything.")
@click.option("--route", is_flag=True, help="Show which implementations run, and why.")
@click.option("--batch", type=Within(COUNT), default=1, show_default=True, help="For --route.")
@click.option("--tokens", type=Within(COUNT), default=1, show_default=True, help="For --route.")
@click.option("--device", default="cpu", show_default=True, help="For --route.")
@click.option("--dtype", default="float32", show_default=True, help="For --route.")
@click.option("--impl", default="auto", show_default=True, help="For --route.")
def info_command(
    model: str | None,
    verify: bool,
    route: bool,
    batch: int,
    tokens: int,
    device: str,
    dtype: str,
    impl: str,
) -> None:
    """Show architecture, parameters and memory of MODEL: a file, a folder or a shipped name.

    Knows every format that `rwkvx convert` knows. Reads headers, not weights. Without MODEL, names
    the models that ship with this package.

    \b
    Examples:
      rwkvx info
      rwkvx info passkey-tiny
      rwkvx info RWKV-X-0.2B-64k-Base.pth
      rwkvx info --verify runs/my-model
      rwkvx info passkey-tiny --route --tokens 4096
    """
    if model is None:
        click.echo("\n".join(shipped_models()) or "no model ships with this installation")
        return
    path = find_model(model)
    if route:
        import rwkvx

        steps = rwkvx.explain(rwkvx.load(path, device, dtype, impl=impl), batch, tokens)
        columns = [max(map(len, column)) for column in list(zip(*steps, strict=True))[:3]]
        for step in steps:
            parts = [f"{text:<{width}}" for text, width in zip(step, columns, strict=False)]
            click.echo("  ".join([*parts, step.why]))
        return
    rows = describe(path)
    if verify:
        rows.append(("verified", detect(path).verify(path)))
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        click.echo(f"{name:<{width}}  {text}")
