"""Our own folder: config.json and model.safetensors."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from rwkvx.checkpoint.files import write_json, write_tensors
from rwkvx.config import ModelConfig
from rwkvx.errors import InputError
from rwkvx.model import Model

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save_folder(model: Model, folder: str | Path) -> None:
    """Write the weights, then the config, each complete or not at all."""
    write_tensors(Path(folder) / WEIGHTS, model.state_dict())
    write_json(Path(folder) / CONFIG, model.config.to_dict())


def read_config(folder: Path) -> ModelConfig:
    """The config of a folder."""
    path = folder / CONFIG
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{folder} is no model folder: cannot read {path}") from error
    except ValueError as error:  # neither UTF-8 nor JSON
        raise InputError(f"{path} is damaged: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} is damaged: it holds no mapping")
    try:
        return ModelConfig.from_dict(data)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def read_folder(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Config and tensors by parameter name."""
    config = read_config(folder)
    return config, read_tensors(folder / WEIGHTS)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file."""
    if not path.is_file():
        raise InputError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is truncated or damaged: {error}") from error
