"""Our own folder: config.json, safetensors (sharded when large), SHA-256 sums of both, and what
Hugging Face's Auto classes want beside them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rwkvx.checkpoint.checkpoint import Checkpoint, merge_config
from rwkvx.checkpoint.foreign import by_config, by_folder
from rwkvx.checkpoint.hub import (
    CONFIG_KEYS,
    own_keys,
    special_ids,
    tokenizer_is_described,
    write_hub_files,
)
from rwkvx.checkpoint.layout import BLOCK, NOTHING, Layout, without_prefix
from rwkvx.checkpoint.manifest import verify_manifest, write_manifest
from rwkvx.checkpoint.shards import SHARD_BYTES, read_weights, remove_other_weights, write_weights
from rwkvx.config import TOKENIZER_CONFIG, TOKENIZER_FILE, TOKENIZER_JSON, ModelConfig
from rwkvx.errors import InputError
from rwkvx.files import is_there, read_mapping, replacing_folder, write_json
from rwkvx.model import Model

TITLE = "folder of rwkvx"
SUFFIXES: tuple[str, ...] = ()  # whatever no other format claims
CONFIG = "config.json"
CONFIG_BYTES = 1_000_000
OWN = Layout("rwkvx", lambda name, _: name, deep=NOTHING, transposed=False, unused=NOTHING)


def matches(path: Path) -> bool:
    """Whether this is a folder; formats that own theirs are asked first."""
    return path.is_dir()


def save_folder(model: Model, folder: str | Path) -> None:
    """Write a model as a folder that `rwkvx.load`, and Hugging Face's Auto classes, read.

    Into `model.safetensors` go the parameters by their names in `model.state_dict()`, each of the
    shape and dtype that it has in memory (float64, float32, bfloat16 or float16), beyond 5 GB in
    shards with `model.safetensors.index.json`. Beside them: `config.json` (the fields of
    `ModelConfig`, special ids), `SHA256SUMS`, which `load(..., verify=True)` checks, and what the
    Auto classes want (`modeling_rwkvx.py`, an import of this package, and
    `tokenizer_config.json`). A tokenizer that is more than a name (`tokenizer.json`, added
    tokens, a chat template) is written whole. The state of an optimiser is not.

    Args:
        model: on any device; it is not changed.
        folder: made, with its parents, where there is none. In one that is there, files of these
            names and weights of an earlier model are replaced, others stay; nothing is replaced
            before everything is written.

    Raises:
        InputError: int8 weights: save the model that was loaded, in its own dtype.
        WriteError: the disk refuses; then nothing has changed. Also an `OSError`.
    """
    write(Checkpoint.of(model), Path(folder))


def write(checkpoint: Checkpoint, folder: Path, shard_bytes: int = SHARD_BYTES) -> str | None:
    """Write the weights, the config and their sums.

    Raises:
        WriteError: the disk refuses; then nothing has changed.
    """
    with replacing_folder(folder) as temporary:
        written = write_weights(temporary, checkpoint.tensors, shard_bytes)
        known = (folder / TOKENIZER_CONFIG).exists()
        write_manifest(temporary, [*write_about(checkpoint, temporary, known), *written])
    remove_other_weights(folder, written)
    return None  # it has a place for everything


def write_about(checkpoint: Checkpoint, folder: Path, known_tokenizer: bool = False) -> list[str]:
    """Write all but the weights; the names of what the manifest is to list.

    known_tokenizer: what Hugging Face wants to know of a tokenizer is there already.
    """
    written = write_tokenizer(checkpoint, folder)
    ends = special_ids(checkpoint.tokenizer)
    write_json(folder / CONFIG, {**CONFIG_KEYS, **ends, **checkpoint.config.to_dict()})
    code = write_hub_files(folder, None if known_tokenizer else checkpoint.config.tokenizer)
    return list(dict.fromkeys([CONFIG, code, *written]))


def read(folder: Path, overrides: Mapping[str, Any], meta: bool = False) -> Checkpoint:
    """Config and tensors by parameter name; memory-mapped, or only their headers read.

    Raises:
        InputError: a file that is missing or damaged; a tensor that is missing, extra or of the
            wrong shape; a depth that is not the pattern's.
    """
    config = merge_config(read_config(folder).to_dict(), overrides)
    tensors = without_prefix(read_weights(folder, meta))
    origin = str(folder)
    depth = 1 + max((int(m[1]) for name in tensors if (m := BLOCK.match(name))), default=-1)
    if depth != len(config.pattern):
        raise InputError(
            f"{origin} holds {depth} blocks, the pattern of its config {len(config.pattern)}"
        )
    return OWN.fit(tensors, config, origin)._replace(tokenizer=tokenizer_beside(config, folder))


def write_tokenizer(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Write the tokenizer, if it is more than a name in the config; the names of the files."""
    if checkpoint.tokenizer is None:
        return []
    from rwkvx.tokenizers.file import save_tokenizer

    return save_tokenizer(checkpoint.tokenizer, folder)


def tokenizer_beside(config: ModelConfig, folder: Path) -> Any:
    """The tokenizer that lies in the folder: the file, if the config says that there is one, or a
    vocabulary of ours with the tokens that were added to it; else None.

    Raises:
        InputError: a file of it is damaged.
    """
    if config.tokenizer == TOKENIZER_FILE and is_there(folder / TOKENIZER_JSON):
        from rwkvx.tokenizers.file import read_tokenizer

        return read_tokenizer(folder)
    if tokenizer_is_described(folder, config.tokenizer):
        from rwkvx.tokenizers import TOKENIZERS
        from rwkvx.tokenizers.file import from_folder

        return from_folder(TOKENIZERS[str(config.tokenizer)], folder)
    return None


def verify(folder: Path) -> str:
    """Check the SHA-256 sums; what was checked. Raises InputError naming a file that changed."""
    return verify_manifest(folder)


def read_config(folder: Path) -> ModelConfig:
    """The config of a folder."""
    path, data = folder / CONFIG, read_json(folder)
    if "pattern" not in data and (words := by_config(data)):
        raise InputError(f"{folder} holds {words}")
    try:
        return ModelConfig.from_dict(own_keys(data))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def read_json(folder: Path) -> dict[str, Any]:
    """What config.json of a folder holds.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = folder / CONFIG
    if not is_there(path):
        words = by_folder(folder)
        raise InputError(
            f"{folder} is no model folder: it is {words}"
            if words
            else f"{folder} is no model folder: cannot read {path}"
        )
    return read_mapping(path, CONFIG_BYTES)
