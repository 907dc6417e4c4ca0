"""Tensors of a folder: `model.safetensors`, or shards of it with the usual index."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rwkvx.checkpoint.files import write_json, write_tensors
from rwkvx.errors import InputError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
_HEADER_LIMIT = 100_000_000  # bytes, as in the safetensors library
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def write_weights(
    folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int = SHARD_BYTES
) -> list[str]:
    """Write one file, or shards of at most so many bytes and their index; the names of the files.

    Shards and an index of an earlier write that these do not replace are removed.
    """
    plan = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=shard_bytes)
    for file, names in plan.filename_to_tensors.items():
        write_tensors(folder / file, {name: tensors[name] for name in names})
    written = list(plan.filename_to_tensors)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / INDEX, index)
        written.append(INDEX)
    else:
        (folder / INDEX).unlink(missing_ok=True)
    for old in folder.glob("model*.safetensors"):
        if old.name not in written:
            old.unlink()
    return written


def read_weights(folder: Path, meta: bool = False) -> dict[str, Tensor]:
    """All tensors of a folder; memory-mapped, or on the meta device with only headers read.

    Raises:
        InputError: a file that is missing, truncated or damaged, or an index that does not fit.
    """
    read = read_header if meta else read_file
    index = folder / INDEX
    if not index.exists():
        return read(folder / WEIGHTS)
    tensors: dict[str, Tensor] = {}
    listed = _read_index(index)
    for file in sorted(set(listed.values())):
        tensors |= read(folder / file)
    for name, file in listed.items():
        if name not in tensors:
            raise InputError(f"{folder / file} lacks the tensor {name}, which {INDEX} names")
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder."""
    index = folder / INDEX
    names = sorted(set(_read_index(index).values())) if index.exists() else [WEIGHTS]
    return [folder / name for name in names]


def read_file(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, memory-mapped (writing to one does not reach the file).

    Raises:
        InputError: missing, truncated or damaged.
    """
    _must_exist(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError) as error:
        raise InputError(f"{path} is truncated or damaged: {error}") from error


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file on the meta device: dtypes and shapes, the data unread.

    Raises:
        InputError: no safetensors file, or one that is cut short.
    """
    _must_exist(path)
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else _HEADER_LIMIT + 1
        if length > min(_HEADER_LIMIT, size - 8):
            raise InputError(f"{path} is no safetensors file, or is truncated")
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            end = 8 + length + max((x["data_offsets"][1] for x in header.values()), default=0)
            tensors = {
                name: torch.empty(x["shape"], dtype=_DTYPES[x["dtype"]], device="meta")
                for name, x in header.items()
            }
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise InputError(f"{path} has a damaged safetensors header: {error}") from None
    if size != end:
        raise InputError(f"{path} has {size} bytes, its header tells of {end}: truncated?")
    return tensors


def _must_exist(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path} is missing")


def _read_index(path: Path) -> dict[str, str]:
    """File by tensor name."""
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        plain = all(Path(file).name == file for file in listed.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged: {error}") from error
    if not plain or not listed:
        raise InputError(f"{path} is damaged: it must name files beside it")
    return dict(listed)
