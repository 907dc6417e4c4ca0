"""``rwkvx info``: what a model is made of, from its config and tensor headers alone."""

import json
import struct
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import click

from rwkvx.checkpoint.folder import WEIGHTS, read_config
from rwkvx.checkpoint.load import find_model, shipped_models
from rwkvx.config import ModelConfig
from rwkvx.errors import InputError

__all__ = ["Memory", "info_command", "memory", "read_header"]

_HEADER_LIMIT = 100_000_000  # bytes, as in the safetensors library


class Memory(NamedTuple):
    """Bytes of one sequence's state: what it always takes, and what each token read adds."""

    constant: int
    per_token: float


def read_header(file: Path) -> dict[str, tuple[str, list[int]]]:
    """Dtype and shape by tensor name of a safetensors file, its data unread.

    Raises InputError for a file that is no safetensors file, or is cut short.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else _HEADER_LIMIT + 1
        if length > min(_HEADER_LIMIT, size - 8):
            raise InputError(f"{file} is no safetensors file, or is cut short")
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            end = 8 + length + max((x["data_offsets"][1] for x in header.values()), default=0)
            tensors = {name: (x["dtype"], x["shape"]) for name, x in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{file} has a broken safetensors header: {error}") from None
    if size != end:
        raise InputError(f"{file} has {size} bytes where its header tells of {end}: cut short?")
    return tensors


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


def describe(folder: Path) -> list[tuple[str, str]]:
    """Rows of the table that ``rwkvx info`` prints."""
    config = read_config(folder)
    weights = folder / WEIGHTS
    tensors = read_header(weights)
    state = memory(config)
    conv = f", key convolution of {config.key_conv}" if config.key_conv else ""
    rows = [
        ("folder", str(folder)),
        ("blocks", f"{len(config.pattern)}: {shape_of_pattern(config.pattern)}"),
        ("width", f"{config.width}, {config.heads} heads of {config.head_size}"),
        ("vocabulary", f"{config.vocab_size}, tokenizer {config.tokenizer}"),
    ]
    if "sparse" in config.pattern:
        text = f"chunks of {config.chunk_size}, top {config.topk}, {config.kv_heads} kv heads{conv}"
        rows.append(("sparse blocks", text))
    kinds = ", ".join(sorted({dtype for dtype, _ in tensors.values()}))
    rows += [
        ("parameters", f"{sum(prod(shape) for _, shape in tensors.values()):,}"),
        ("weights", f"{size(weights.stat().st_size)}, {kinds}"),
        ("state", f"{size(state.constant)} + {state.per_token:,.0f} B per token (float32)"),
    ]
    totals = ((name, state.constant + state.per_token * n) for name, n in _LENGTHS)
    rows.append(("state at", ", ".join(f"{name}: {size(total)}" for name, total in totals)))
    return rows


_LENGTHS = (("16K", 2**14), ("64K", 2**16), ("1M", 2**20))


@click.command("info")
@click.argument("model", required=False)
def info_command(model: str | None) -> None:
    """Show architecture, parameters and memory of MODEL: a shipped name or a folder.

    Reads config.json and the header of the weights, not the weights. Without MODEL, names the
    models that ship with this package.

    \b
    Examples:
      rwkvx info
      rwkvx info passkey-tiny
      rwkvx info runs/my-model
    """
    if model is None:
        click.echo("\n".join(shipped_models()) or "no model ships with this installation")
        return
    folder = find_model(model)
    if not folder.is_dir():
        raise InputError(f"{model} is a file: `rwkvx info` reads a folder with config.json")
    rows = describe(folder)
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        click.echo(f"{name:<{width}}  {text}")
