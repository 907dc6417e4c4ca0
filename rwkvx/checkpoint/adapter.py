"""The folder of an adapter (`rwkvx.adapters`): tensors, config, and which model it belongs to.

The base model is named by a fingerprint of its weights, whatever dtype its file has.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rwkvx.adapters import AdapterConfig, updated
from rwkvx.checkpoint.manifest import verify_manifest, write_manifest
from rwkvx.checkpoint.safetensors import write_tensors
from rwkvx.checkpoint.shards import read_file
from rwkvx.errors import InputError, shown
from rwkvx.files import is_there, read_json, replacing_folder, write_json
from rwkvx.settings import from_plain

TENSORS, ABOUT = "adapter.safetensors", "adapter.json"


class Adapter(NamedTuple):
    """What was trained beside a model.

    Attributes:
        config: which kind; tensors: by name, see `adapter_tensors`.
        base: fingerprint of the model's weights; base_model: its name or path in training.
        origin: the folder.
    """

    config: AdapterConfig
    tensors: dict[str, Tensor]
    base: str
    base_model: str
    origin: Path


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and values in float32, hexadecimal: whatever dtype a file has."""
    digest = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {list(x.shape)}".encode())
        data = x.detach().to("cpu", torch.float32).contiguous().view(-1)
        digest.update(data.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter."""
    return is_there(folder / ABOUT)


def write_adapter(adapter: Adapter, folder: Path) -> None:
    """Write an adapter with the sums of its files.

    Raises:
        WriteError: the disk refuses; then nothing has changed.
    """
    with replacing_folder(folder) as temporary:
        write_tensors(temporary / TENSORS, adapter.tensors)
        config = {**asdict(adapter.config), "targets": list(adapter.config.targets)}
        about = {"base": adapter.base, "base_model": adapter.base_model, "adapter": config}
        write_json(temporary / ABOUT, about)
        write_manifest(temporary, [TENSORS, ABOUT])


def read_adapter(folder: Path, verify: bool = False) -> Adapter:
    """Read an adapter.

    Raises:
        InputError: none is there, or it is damaged.
    """
    if verify:
        verify_manifest(folder)
    path = folder / ABOUT
    about = read_json(path)
    if not isinstance(about, dict) or not isinstance(about.get("adapter"), dict):
        raise InputError(f"{path} is damaged: it describes no adapter")
    base, model = about.get("base"), about.get("base_model", "")
    if not isinstance(base, str) or not isinstance(model, str):
        raise InputError(f"{path} is damaged: it names no base model")
    config = from_plain(AdapterConfig, about["adapter"], str(path))
    if not config.kind:
        raise InputError(f"{path} is damaged: it describes no adapter")
    return Adapter(config, dict(read_file(folder / TENSORS)), base, model, folder)


def merge(adapter: Adapter, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of its base with low-rank updates added; updated ones are float32 or wider.

    Raises:
        InputError: the weights are those of another model, or the updates do not fit them.
    """
    if adapter.base != fingerprint(tensors):
        raise InputError(f"{adapter.origin} is an adapter of another model than this one")
    if adapter.config.kind == "state":  # no weight: see `set_starting_state`
        return dict(tensors)
    found, rest = dict(tensors), set(adapter.tensors)
    for name in [n for n in adapter.tensors if n.endswith(".up")]:
        module = name.removesuffix(".up")
        up, down = adapter.tensors[name], adapter.tensors.get(f"{module}.down")
        weight = tensors.get(f"{module}.weight")
        product = weight is not None and down is not None and up.dim() == down.dim() == 2
        shape = (len(up), down.shape[-1]) if product and down is not None else None
        if weight is None or down is None or weight.shape != shape or up.shape[1] != len(down):
            raise _misfit(adapter, name)
        wide = torch.promote_types(weight.dtype, torch.float32)
        weight, up, down = (x.to(wide) for x in (weight, up, down))
        found[f"{module}.weight"] = updated(weight, up, down, adapter.config.scale)
        rest -= {name, f"{module}.down"}
    if rest:
        raise _misfit(adapter, min(rest))
    return found


def _misfit(adapter: Adapter, name: str) -> InputError:
    return InputError(f"{adapter.origin / TENSORS}: {shown(name)} does not fit the base model")
