"""`rwkvx.load`: a model from a shipped name, our own folder or a `.pth` file."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkvx.checkpoint.folder import read_folder
from rwkvx.checkpoint.rwkvx_pth import read_pth
from rwkvx.config import ModelConfig
from rwkvx.errors import InputError
from rwkvx.model import Model

DTYPES = ("float32", "bfloat16", "float16", "float64")


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


def load(path: str | Path, device: str = "cpu", dtype: str = "float32", **overrides: Any) -> Model:
    """Load a model, in evaluation mode.

    Args:
        path: a shipped name ("passkey-tiny"), our own folder (config.json, model.safetensors), or
            an RWKV-X `.pth` file (chunk_size 2048 and topk 3 unless overridden).
        device: where the weights go. dtype: "float32", "bfloat16", "float16" or "float64".
        overrides: fields of `ModelConfig` that leave the parameters as they are, such as
            chunk_size=..., topk=....

    Raises:
        InputError: nothing there, an unknown format, or weights that do not fit.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    where = usable_device(device)
    found = find_model(path)
    if found.is_dir():
        config, tensors = read_folder(found)
    elif found.suffix == ".pth":
        config, tensors = read_pth(found)
    else:
        raise InputError(f"{found} is neither a folder with config.json nor a .pth file")
    if overrides:
        config = ModelConfig.from_dict({**config.to_dict(), **overrides})
    return build(config, tensors, str(found)).to(where, getattr(torch, dtype)).eval()


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


def build(config: ModelConfig, tensors: dict[str, Tensor], origin: str) -> Model:
    """A model with these weights (dtypes as they are).

    Raises:
        InputError: a tensor that is missing, extra, or of the wrong shape, by name.
    """
    with torch.device("meta"):
        model = Model(config)
    expected = {name: p.shape for name, p in model.state_dict().items()}
    for name, shape in expected.items():
        if name not in tensors:
            raise InputError(f"{origin} lacks the tensor {name}")
        if tensors[name].shape != shape:
            raise InputError(
                f"{origin}: {name} is {list(tensors[name].shape)}, expected {list(shape)}"
            )
    extra = sorted(set(tensors) - set(expected))
    if extra:
        raise InputError(f"{origin} has a tensor that the model has no place for: {extra[0]}")
    model.load_state_dict(tensors, assign=True)
    return model
