"""Our own folder: config.json, safetensors (sharded when large), SHA-256 sums of both, and what
Hugging Face's Auto classes want beside them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rwkvx.checkpoint.checkpoint import Checkpoint, merge_config
from rwkvx.checkpoint.files import write_json
from rwkvx.checkpoint.hub import CONFIG_KEYS, own_keys, special_ids, write_hub_files
from rwkvx.checkpoint.layout import BLOCK, NOTHING, Layout
from rwkvx.checkpoint.manifest import verify_manifest, write_manifest
from rwkvx.checkpoint.shards import SHARD_BYTES, read_weights, write_weights
from rwkvx.config import TOKENIZER_FILE, TOKENIZER_JSON, ModelConfig
from rwkvx.errors import InputError
from rwkvx.model import Model

TITLE = "folder of rwkvx"
SUFFIXES: tuple[str, ...] = ()  # whatever no other format claims
CONFIG = "config.json"
OWN = Layout(lambda name, _: name, {}, deep=NOTHING, transposed=False, unused=NOTHING)


def matches(path: Path) -> bool:
    """Whether this is a folder; formats that own theirs are asked first."""
    return path.is_dir()


def save_folder(model: Model, folder: str | Path) -> None:
    """Write a model; see `write`."""
    write(Checkpoint.of(model), Path(folder))


def write(checkpoint: Checkpoint, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the weights, the config, then their sums, each file complete or not at all."""
    written = write_weights(folder, checkpoint.tensors, shard_bytes)
    ends = special_ids(checkpoint.tokenizer)
    write_json(folder / CONFIG, {**CONFIG_KEYS, **ends, **checkpoint.config.to_dict()})
    written += write_tokenizer(checkpoint, folder)
    code = write_hub_files(folder, checkpoint.config.tokenizer)
    write_manifest(folder, [CONFIG, code, *written])


def read(folder: Path, overrides: Mapping[str, Any], meta: bool = False) -> Checkpoint:
    """Config and tensors by parameter name; memory-mapped, or only their headers read.

    Raises:
        InputError: a file that is missing or damaged; a tensor that is missing, extra or of the
            wrong shape; a depth that is not the pattern's.
    """
    config = merge_config(read_config(folder).to_dict(), overrides)
    tensors = read_weights(folder, meta)
    origin = str(folder)
    depth = 1 + max((int(m[1]) for name in tensors if (m := BLOCK.match(name))), default=-1)
    if depth != len(config.pattern):
        raise InputError(
            f"{origin} holds {depth} blocks, the pattern of its config {len(config.pattern)}"
        )
    return OWN.fit(tensors, config, origin)._replace(tokenizer=tokenizer_beside(config, folder))


def write_tokenizer(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Write the tokenizer, if the model's is a file; the names of the files."""
    if checkpoint.tokenizer is None:
        return []
    from rwkvx.tokenizers.file import save_tokenizer

    return save_tokenizer(checkpoint.tokenizer, folder)


def tokenizer_beside(config: ModelConfig, folder: Path) -> Any:
    """The tokenizer that lies in the folder, if the config says that one does."""
    if config.tokenizer != TOKENIZER_FILE:
        return None
    from rwkvx.tokenizers.file import read_tokenizer

    return read_tokenizer(folder) if (folder / TOKENIZER_JSON).exists() else None


def verify(folder: Path) -> str:
    """Check the SHA-256 sums; what was checked. Raises InputError naming a file that changed."""
    return verify_manifest(folder)


def read_config(folder: Path) -> ModelConfig:
    """The config of a folder."""
    path = folder / CONFIG
    try:
        return ModelConfig.from_dict(own_keys(read_json(folder)))
    except InputError as error:
        raise error if str(path) in str(error) else InputError(f"{path}: {error}") from error


def read_json(folder: Path) -> dict[str, Any]:
    """What config.json of a folder holds.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = folder / CONFIG
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{folder} is no model folder: cannot read {path}") from error
    except ValueError as error:  # neither UTF-8 nor JSON
        raise InputError(f"{path} is damaged: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} is damaged: it holds no mapping")
    return data
