"""`rwkvx.load`: a model from a shipped name, or from a file or folder of any known format."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rwkvx.adapters import set_starting_state
from rwkvx.checkpoint.adapter import Adapter, is_adapter, merge, read_adapter
from rwkvx.checkpoint.checkpoint import Checkpoint, cast, check_room, check_vocabulary
from rwkvx.checkpoint.folder import CONFIG
from rwkvx.checkpoint.formats import detect
from rwkvx.checkpoint.shards import INDEX, OLD_INDEX
from rwkvx.dtypes import DTYPES
from rwkvx.errors import InputError, one_line, shown
from rwkvx.files import is_there, open_regular, user_path
from rwkvx.model import Model
from rwkvx.quantize import quantize
from rwkvx.shipped import MODELS, shipped_models


def find_model(path: str | Path) -> Path:
    """The file or folder that `path` names: a path, or the name of a shipped model.

    Weights, an index or a config.json inside a model's folder mean the folder.

    Raises:
        InputError: neither is there, or it is something that is not read, such as a pipe.
    """
    found = user_path(path)
    if not is_there(found):
        shipped = MODELS / str(path)
        if "/" not in str(path) and (shipped / CONFIG).exists():
            return shipped
        known = ", ".join(shipped_models()) or "none"
        hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path))
        way = f"; from the hub: `hf download {path} --local-dir DIR`, then name DIR" if hub else ""
        raise InputError(
            f"no model {shown(str(path))}: not a file or folder, nor shipped ({known}){way}"
        )
    if found.is_dir():
        return found
    with open_regular(found):  # or say why not
        pass
    own = found.suffix == ".safetensors" or found.name in (CONFIG, INDEX, OLD_INDEX)
    return found.parent if own and (found.parent / CONFIG).is_file() else found


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    *,
    impl: str = "auto",
    verify: bool = False,
    adapter: str | Path | None = None,
    **overrides: Any,
) -> Model:
    """Load a model, in evaluation mode.

    Weights that are of that dtype already and stay on the CPU are used where they are: mapped
    from the file (safetensors, .pth) into memory, not copied. Training does not reach the file.

    Args:
        path: a shipped name ("passkey-tiny"), our own folder, a `.pth` or safetensors file of
            RWKV-7 or RWKV-X (chunk_size 2048 and topk 3 unless overridden or kept beside it), a
            Hugging Face folder of flash-linear-attention's RWKV7, or a ggml file of rwkv.cpp.
        device: where the weights go.
        dtype: "float32", "bfloat16", "float16", "float64", or "int8": projections and head in
            int8 with a scale for each row, the rest in bfloat16: for decoding; such a model
            can be neither trained nor saved. torch's own, such as torch.float32, will do too.
        impl: which implementations run: "auto", "reference" (the equations, slowly), "torch",
            "compiled" (Numba; a CPU, no gradients) or "triton" (a GPU). See `rwkvx.explain`.
        verify: check the file's checksums first: SHA-256 in folders, CRC-32 in `.pth`.
        adapter: folder of an adapter of this model: low-rank updates are added to the weights, a
            starting state is what every sequence starts from. Such a folder as `path` means its
            base model with it.
        overrides: fields of `ModelConfig` that leave the parameters as they are, such as
            chunk_size=..., topk=..., tokenizer=....

    Raises:
        InputError: nothing there, an unknown format, damage, weights that do not fit, are not
            finite or overflow in `dtype`, or more of them than this machine has memory.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {shown(dtype)}")
    where = usable_device(str(device))
    wide = torch.bfloat16 if name == "int8" else getattr(torch, name)
    found, beside = with_adapter(find_model(path), adapter, verify)
    checkpoint = read_checkpoint(found, overrides, verify, wide, beside)
    model = checkpoint.model().to(where)
    if beside is not None and beside.config.kind == "state":
        set_starting_state(model, beside.tensors)
    model.impl = impl
    return quantize(model) if name == "int8" else model


def with_adapter(
    path: Path, adapter: str | Path | None, verify: bool = False
) -> tuple[Path, Adapter | None]:
    """A model's path and its adapter; the folder of an adapter alone means its base with it.

    Raises:
        InputError: an adapter that is damaged, or whose base is not to be found.
    """
    if adapter is not None:
        return path, read_adapter(user_path(adapter), verify)
    if not path.is_dir() or not is_adapter(path):
        return path, None
    found = read_adapter(path, verify)
    try:
        return find_model(found.base_model), found
    except InputError as error:
        raise InputError(
            f"{path} is an adapter of {shown(found.base_model)}, which is not there: name the base "
            "model, and this folder as its adapter"
        ) from error


def read_checkpoint(
    path: Path,
    overrides: Mapping[str, Any],
    verify: bool = False,
    dtype: torch.dtype | None = None,
    adapter: Adapter | None = None,
) -> Checkpoint:
    """Config and tensors of a file or folder, sound; in `dtype`, or in those they have there; with
    the updates of an adapter added.

    Raises:
        InputError: as `load`.
    """
    found = detect(path)
    # Headers first: what does not fit costs no reading.
    checkpoint = found.read(path, overrides, True)
    check_vocabulary(checkpoint.config, str(path), checkpoint.tokenizer)
    check_room(checkpoint, dtype, str(path))
    if verify:
        found.verify(path)
    checkpoint = found.read(path, overrides)
    stored = checkpoint.tensors
    whole = stored if adapter is None else merge(adapter, stored)
    tensors = {
        name: cast(x, dtype or stored[name].dtype, f"{path}: {name}") for name, x in whole.items()
    }
    return checkpoint._replace(tensors=tensors)


def usable_device(name: str) -> torch.device:
    """The device of that name, on which a number has been computed.

    Raises:
        InputError: there is none, or this torch cannot compute on it.
    """
    try:
        with warnings.catch_warnings():  # about devices of the past
            warnings.simplefilter("ignore")
            device = torch.device(name)
            torch.ones(1, device=device).add(1).item()
    except Exception as error:  # each back end has errors of its own
        reason = one_line(str(error).partition("\n")[0], 120)
        raise InputError(f"device {shown(name)} cannot be used: {reason}") from error
    return device
