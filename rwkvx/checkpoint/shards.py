"""Tensors of a folder: one file, or shards of it with the usual index; safetensors or PyTorch's."""

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from rwkvx.checkpoint.pickled import stored_in_pickle
from rwkvx.checkpoint.safetensors import is_safetensors, stored_in_safetensors, write_tensors
from rwkvx.checkpoint.stored import MOST_TENSORS, read_stored
from rwkvx.errors import InputError, shown
from rwkvx.files import is_there, read_json, write_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# What Hugging Face wrote before; read where there is nothing else, by the same rules as a `.pth`.
OLD_WEIGHTS, OLD_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SHARD_BYTES = 5 * 10**9


def write_weights(
    folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int = SHARD_BYTES
) -> list[str]:
    """Write one file, or shards of at most so many bytes with an index; the names of the files."""
    plan = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=shard_bytes)
    for file, names in plan.filename_to_tensors.items():
        write_tensors(folder / file, {name: tensors[name] for name in names})
    written = list(plan.filename_to_tensors)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / INDEX, index)
        written.append(INDEX)
    return written


def remove_other_weights(folder: Path, written: list[str]) -> None:
    """Remove weights and an index of an earlier write that `written` does not replace."""
    for old in (*folder.glob("model*.safetensors"), folder / INDEX):
        if old.name not in written:
            old.unlink(missing_ok=True)


def read_weights(folder: Path, meta: bool = False) -> dict[str, Tensor]:
    """All tensors of a folder; memory-mapped, or on the meta device with only headers read.

    Raises:
        InputError: a file that is missing, truncated or damaged, or an index that does not fit.
    """
    index = next((folder / name for name in (INDEX, OLD_INDEX) if is_there(folder / name)), None)
    if index is None:
        return read_file(weight_files(folder)[0], meta)
    tensors: dict[str, Tensor] = {}
    listed = _read_index(index)
    for file in sorted(set(listed.values())):
        tensors |= read_file(folder / file, meta)
    for name, file in listed.items():
        if name not in tensors:
            raise InputError(
                f"{folder / file} lacks the tensor {shown(name)[1:-1]}, which {index.name} names"
            )
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a folder; they may be missing."""
    for index in (folder / INDEX, folder / OLD_INDEX):
        if is_there(index):
            return [folder / name for name in sorted(set(_read_index(index).values()))]
    old = is_there(folder / OLD_WEIGHTS) and not is_there(folder / WEIGHTS)
    return [folder / (OLD_WEIGHTS if old else WEIGHTS)]


def read_file(path: Path, meta: bool = False) -> dict[str, Tensor]:
    """All tensors of a file, mapped (writing to one does not reach the file), or on meta.

    Raises:
        InputError: missing, truncated or damaged.
    """
    if not is_there(path):
        raise InputError(f"{path} is missing")
    old = path.suffix == ".bin" and not is_safetensors(path)
    return read_stored(path, stored_in_pickle(path) if old else stored_in_safetensors(path), meta)


def _read_index(path: Path) -> dict[str, str]:
    """File by tensor name."""
    data = read_json(path)
    listed = data.get("weight_map") if isinstance(data, dict) else None
    plain = isinstance(listed, dict) and all(
        isinstance(file, str) and Path(file).name == file and "\0" not in file
        for file in listed.values()
    )
    if not listed or not plain or len(listed) > MOST_TENSORS:
        raise InputError(f"{path} is damaged: it must name files beside it")
    return dict(listed)
