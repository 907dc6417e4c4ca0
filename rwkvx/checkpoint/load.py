"""`rwkvx.load`: a model from a shipped name, or from a file or folder of any known format."""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from rwkvx.checkpoint.checkpoint import Checkpoint, check_finite, check_vocabulary
from rwkvx.checkpoint.formats import detect
from rwkvx.errors import InputError
from rwkvx.model import Model
from rwkvx.quantize import quantize

DTYPES = ("float32", "bfloat16", "float16", "float64", "int8")


def shipped_models() -> list[str]:
    """Names of the models inside the package."""
    folder = Path(str(files("rwkvx"))) / "models"
    return sorted(p.parent.name for p in folder.glob("*/config.json"))


def find_model(path: str | Path) -> Path:
    """The file or folder that `path` names: a path, or the name of a shipped model.

    Raises:
        InputError: neither is there.
    """
    found = Path(path).expanduser()
    if found.exists():
        return found
    shipped = Path(str(files("rwkvx"))) / "models" / str(path)
    if (shipped / "config.json").exists():
        return shipped
    known = ", ".join(shipped_models()) or "none"
    raise InputError(f"no model {str(path)!r}: not a file or folder, nor shipped ({known})")


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    *,
    verify: bool = False,
    **overrides: Any,
) -> Model:
    """Load a model, in evaluation mode.

    Weights that are of that dtype already and stay on the CPU are used where they are: mapped
    from the file (safetensors, .pth) into memory, not copied. Training does not reach the file.

    Args:
        path: a shipped name ("passkey-tiny"), our own folder, a `.pth` file of RWKV-7 or RWKV-X
            (chunk_size 2048 and topk 3 unless overridden), a Hugging Face folder of
            flash-linear-attention's RWKV7, or a ggml file of rwkv.cpp.
        device: where the weights go.
        dtype: "float32", "bfloat16", "float16", "float64", or "int8": projections and head in
            int8 with a scale for each row, the rest in bfloat16: for decoding; such a model
            can be neither trained nor saved. torch's own, such as torch.float32, will do too.
        verify: check the file's checksums first: SHA-256 in folders, CRC-32 in `.pth`.
        overrides: fields of `ModelConfig` that leave the parameters as they are, such as
            chunk_size=..., topk=..., tokenizer=....

    Raises:
        InputError: nothing there, an unknown format, damage, weights that do not fit or are not
            finite.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    where = usable_device(str(device))
    model = read_checkpoint(find_model(path), overrides, verify).model()
    if name == "int8":
        return quantize(model.to(where, torch.bfloat16))
    return model.to(where, getattr(torch, name))


def read_checkpoint(path: Path, overrides: Mapping[str, Any], verify: bool = False) -> Checkpoint:
    """Config and tensors of a file or folder, with the dtypes they have there, and sound.

    Raises:
        InputError: as `load`.
    """
    found = detect(path)
    if verify:
        found.verify(path)
    checkpoint = found.read(path, overrides)
    check_vocabulary(checkpoint.config, str(path), checkpoint.tokenizer)
    check_finite(checkpoint, str(path))
    return checkpoint


def usable_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        InputError: there is none, or this torch cannot use it.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} cannot be used: {error}") from error
    return device
