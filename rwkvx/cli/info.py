"""``rwkvx info``: what a model is made of, from its config and tensor headers alone."""

from pathlib import Path
from typing import Any, NamedTuple

import click

from rwkvx.checkpoint.checkpoint import check_vocabulary
from rwkvx.checkpoint.formats import detect
from rwkvx.checkpoint.load import find_model, shipped_models
from rwkvx.checkpoint.sidecar import read_sidecar, sidecar_of
from rwkvx.config import ModelConfig
from rwkvx.errors import InputError

__all__ = ["Memory", "info_command", "memory"]


class Memory(NamedTuple):
    """Bytes of one sequence's state: what it always takes, and what each token read adds."""

    constant: int
    per_token: float


def memory(config: ModelConfig, element: int = 4) -> Memory:
    """State of one sequence. `element`: bytes of a number of the model's dtype."""
    kv_width = config.kv_heads * config.head_size
    wkv = config.heads * config.head_size**2 * 4  # the matrix state is float32 always
    rwkv = 2 * config.width * element + wkv
    sparse = (config.width + max(config.key_conv - 1, 0) * kv_width) * element
    # Keys and values, and one float32 mean of the keys for each chunk.
    per_token = kv_width * (2 * element + 4 / config.chunk_size)
    counts = {kind: config.pattern.count(kind) for kind in ("rwkv7", "sparse")}
    return Memory(counts["rwkv7"] * rwkv + counts["sparse"] * sparse, counts["sparse"] * per_token)


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
    state = memory(config)
    conv = f", key convolution of {config.key_conv}" if config.key_conv else ""
    rows = [
        ("model", str(path)),
        ("format", found.TITLE),
        ("blocks", f"{len(config.pattern)}: {shape_of_pattern(config.pattern)}"),
        ("width", f"{config.width}, {config.heads} heads of {config.head_size}"),
        ("low ranks", ", ".join(f"{name} {rank}" for name, rank in config.ranks.items())),
        ("vocabulary", vocabulary(config, tokenizer)),
    ]
    if "sparse" in config.pattern:
        text = f"chunks of {config.chunk_size}, top {config.topk}, {config.kv_heads} kv heads{conv}"
        rows.append(("sparse blocks", text))
    if kept := read_sidecar(path):
        rows.append(("told by", f"{sidecar_of(path)}: {', '.join(kept)}"))
    kinds = sorted({str(x.dtype).removeprefix("torch.") for x in tensors.values()})
    stored = sum(x.numel() * x.element_size() for x in tensors.values())
    rows += [
        ("parameters", f"{sum(x.numel() for x in tensors.values()):,}"),
        ("weights", f"{size(stored)}, {', '.join(kinds)}"),
        ("state", f"{size(state.constant)} + {state.per_token:,.0f} B per token (float32)"),
    ]
    totals = ((name, state.constant + state.per_token * n) for name, n in _LENGTHS)
    rows.append(("state at", ", ".join(f"{name}: {size(total)}" for name, total in totals)))
    return rows


_LENGTHS = (("16K", 2**14), ("64K", 2**16), ("1M", 2**20))


@click.command("info")
@click.argument("model", required=False)
@click.option("--verify", is_flag=True, help="Check the checksums too, which reads everything.")
def info_command(model: str | None, verify: bool) -> None:
    """Show architecture, parameters and memory of MODEL: a file, a folder or a shipped name.

    Knows every format that `rwkvx convert` knows. Reads headers, not weights. Without MODEL, names
    the models that ship with this package.

    \b
    Examples:
      rwkvx info
      rwkvx info passkey-tiny
      rwkvx info RWKV-X-0.2B-64k-Base.pth
      rwkvx info --verify runs/my-model
    """
    if model is None:
        click.echo("\n".join(shipped_models()) or "no model ships with this installation")
        return
    path = find_model(model)
    rows = describe(path)
    if verify:
        rows.append(("verified", detect(path).verify(path)))
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        click.echo(f"{name:<{width}}  {text}")
