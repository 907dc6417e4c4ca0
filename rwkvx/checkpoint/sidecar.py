"""What a format has no place for: said when a file is written, and kept in a small file beside it.

`NAME.pth.json` beside `NAME.pth`, `rwkvx.json` inside a folder. It carries what identifies the file
that it belongs to, so that one that has been left behind is noticed.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rwkvx.checkpoint.checkpoint import Checkpoint
from rwkvx.checkpoint.shards import weight_files
from rwkvx.config import ModelConfig, field_names
from rwkvx.errors import InputError, WriteError, shown
from rwkvx.files import is_there, open_regular, read_json, write_json
from rwkvx.kinds import KINDS

Reader = Callable[[Path, Mapping[str, Any], bool], Checkpoint]

_IN_FOLDER = "rwkvx.json"
_MOST_BYTES = 100_000
_SAMPLE = 1 << 20  # bytes at the beginning, in the middle and at the end of a file
_RANKS = {"decay_rank": "w", "iclr_rank": "a", "value_rank": "v", "gate_rank": "g"}


def sidecar_of(path: Path) -> Path:
    """Where the sidecar of a file or folder is."""
    return path / _IN_FOLDER if path.is_dir() else path.with_name(f"{path.name}.json")


def lost_fields(config: ModelConfig, found: ModelConfig) -> dict[str, Any]:
    """Fields of `config` that reading the file gives another value, as plain data."""
    whole, read = _explicit(config), _explicit(found)
    of_kinds = {field for kind in KINDS.values() for field in kind.fields}
    without_effect = of_kinds - {x for kind in config.pattern for x in KINDS[kind].used(config)}
    return {n: x for n, x in whole.items() if x != read[n] and n not in without_effect}


def keep_lost(checkpoint: Checkpoint, path: Path, title: str, read: Reader) -> str | None:
    """Keep what of the config the file just written at `path` cannot hold; what to tell of it, and
    of a tokenizer that only a folder holds.

    Raises:
        WriteError: the disk refuses; then the file is removed: it would be read as another model.
    """
    config, sidecar = checkpoint.config, sidecar_of(path)
    sidecar.unlink(missing_ok=True)
    left = None if checkpoint.tokenizer is None or path.is_dir() else _without_tokenizer(title)
    try:
        found = read(path, {}, True).config
    except (
        InputError
    ):  # an order of blocks that is not the usual one, and cannot be read from names
        found = read(path, {"pattern": config.pattern}, True).config
        found = replace(found, pattern=config.pattern[:1])
    lost = lost_fields(config, found)
    if not lost:
        return left
    try:
        write_json(sidecar, {"config": lost, "belongs_to": _identity(path)})
    except WriteError:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise
    said = _said(path, title, lost)
    return said if left is None else f"{said}\n{left}"


def _without_tokenizer(title: str) -> str:
    return (
        f"a {title} has no place for the tokenizer: keep the model's folder, and give its "
        "tokenizer to the loaded model (model.use_tokenizer)"
    )


def with_sidecar(path: Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The fields kept beside a file or folder, and what the caller asked for over them."""
    return {**read_sidecar(path), **overrides}


def read_sidecar(path: Path) -> dict[str, Any]:
    """The fields kept beside a file or folder, none where there is no sidecar.

    Raises:
        InputError: it is damaged, or belongs to another file.
    """
    sidecar = sidecar_of(path)
    if not is_there(sidecar):
        return {}
    data = read_json(sidecar, _MOST_BYTES)
    if not isinstance(data, dict) or set(data) != {"config", "belongs_to"}:
        return {}  # somebody else's file of that name
    kept = data["config"]
    if not isinstance(kept, dict) or not set(kept) <= field_names():
        raise InputError(f"{sidecar} is damaged: it holds no fields of a model")
    if data["belongs_to"] != _identity(path):
        raise InputError(
            f"{sidecar} tells of another {path.name} than the one beside it: remove it, and give "
            f"what it would tell ({', '.join(kept)}) as arguments"
        )
    return kept


def _said(path: Path, title: str, lost: Mapping[str, Any]) -> str:
    """What a user must know about fields that a file cannot hold, in one line."""
    values = ", ".join(f"{name}={shown(x)}" for name, x in lost.items())
    return (
        f"a {title} has no place for {', '.join(lost)}: kept in {sidecar_of(path).name}, which is "
        f"read here (without it: rwkvx.load({str(path)!r}, {values})); other programs must be told"
    )


def _explicit(config: ModelConfig) -> dict[str, Any]:
    """All fields, what is left to a rule given as the number that it makes."""
    ranks = {name: config.ranks[letter] for name, letter in _RANKS.items()}
    return {**config.to_dict(), **ranks, "sparse_kv_heads": config.kv_heads}


def _identity(path: Path) -> list[dict[str, Any]]:
    """Of each file that holds weights: name, size, and SHA-256 of parts of it."""
    found = []
    for part in weight_files(path) if path.is_dir() else [path]:
        digest = hashlib.sha256()
        with open_regular(part) as file:
            size = os.fstat(file.fileno()).st_size
            for start in (0, size // 2, max(0, size - _SAMPLE)):
                file.seek(start)
                digest.update(file.read(_SAMPLE))
        found.append({"size": size, "sha256_of_parts": digest.hexdigest()})
    return found
