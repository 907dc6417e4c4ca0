"""What is measured: our model, by name or by shape."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import rwkvx
from rwkvx.errors import InputError
from rwkvx.files import read_yaml, user_path
from rwkvx.quantize import quantize
from rwkvx.shipped import find_config, shipped_configs, shipped_models

SEED = 0


def read_shape(path: Path) -> rwkvx.ModelConfig:
    """The `model` section of a YAML file; raises InputError when there is none that fits."""
    try:
        data = read_yaml(path)
    except InputError as error:
        raise InputError(f"cannot read {path}: {error}") from error
    section = data.get("model") if isinstance(data, dict) else None
    if not isinstance(section, dict):
        raise InputError(f"{path} has no section `model`")
    return rwkvx.ModelConfig.from_dict(section)


def find_shape(name: str) -> rwkvx.ModelConfig:
    """By the name of a configuration or a .yaml file; raises InputError for what is no shape."""
    path = find_config(name)
    if path is None:
        raise InputError(f"no shape {name!r}: a .yaml file, or {', '.join(shipped_configs())}")
    return read_shape(path)


def open_model(name: str, dtype: str, selection: str = "flat") -> tuple[rwkvx.Model, str]:
    """The model and where its weights are from: a shape with random weights, or whatever loads.

    Raises InputError for a name that is neither.
    """
    shape = find_config(name)
    if shape is not None:
        config = replace(read_shape(shape), selection=selection)
        model = random_model(config)
        if dtype == "int8":
            model = quantize(model.to(torch.bfloat16))
        else:
            model = model.to(getattr(torch, dtype))
        return model.eval(), f"random, shape of {shape.name}"
    try:
        model = rwkvx.load(name, dtype=dtype, selection=selection)
    except InputError as error:
        if user_path(name).exists() or name in shipped_models():
            raise
        raise InputError(f"{error}, nor a shape ({', '.join(shipped_configs())})") from error
    return model, Path(name).name


@torch.no_grad()
def random_model(config: rwkvx.ModelConfig) -> rwkvx.Model:
    """Random weights of a sane scale, none of them zero, drawn in place (no memory beyond them).

    Fresh initial weights will not do: there, blocks put out nothing at all.
    """
    model = rwkvx.Model(config)
    draw = torch.Generator().manual_seed(SEED)
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    norms = {id(m.weight) for m in model.modules() if isinstance(m, nn.LayerNorm | nn.GroupNorm)}
    for name, x in model.named_parameters():
        last = name.rpartition(".")[2]
        if id(x) in matrices:
            x.normal_(0, x.shape[1] ** -0.5, generator=draw)
        elif id(x) in norms or last in ("k_k", "k_a"):
            x.normal_(1, 0.1, generator=draw)
        elif last.startswith("x_"):
            x.uniform_(0, 1, generator=draw)
        elif x.dim() == 2 and last[-1] in "12":
            x.normal_(0, x.shape[0] ** -0.5, generator=draw)
        else:
            x.normal_(0, 0.5, generator=draw)
    return model.eval()
