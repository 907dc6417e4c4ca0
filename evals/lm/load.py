"""The model to evaluate, from what a user named; and what to do with models of others."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import rwkvx
from rwkvx.checkpoint.load import find_model
from rwkvx.errors import InputError
from rwkvx_evals.files import short
from rwkvx_evals.models.open import kind_of_others

logger = logging.getLogger("lm_eval.rwkvx")


def open_model(
    named: Any,
    device: str = "cpu",
    dtype: str = "float32",
    overrides: Mapping[str, Any] | None = None,
) -> Any:
    """A loaded model as it is, or what `rwkvx.load` makes of a name or path.

    Without CUDA the CPU takes its place, with a warning: lm-eval asks for cuda:0 by default.
    Raises InputError as `rwkvx.load`; for another library's model it says which command takes it.
    """
    if named is None:
        raise InputError("lm-eval's model rwkvx needs pretrained=NAME or a path")
    if not isinstance(named, str | Path):
        return named
    if str(device).startswith("cuda") and not torch.cuda.is_available():
        logger.warning("device %s is not there: the CPU takes its place", device)
        device = "cpu"
    return load(str(named), device, dtype, overrides)


def load(
    named: str, device: str, dtype: str, overrides: Mapping[str, Any] | None = None
) -> rwkvx.Model:
    """`rwkvx.load`; raises InputError that says what takes a model that is another library's."""
    try:
        return rwkvx.load(named, device=device, dtype=dtype, **(overrides or {}))
    except InputError as error:
        path = find_model(named)
        kind = kind_of_others(path)
        if kind is None:
            raise
        raise InputError(
            f"{short(path)} holds a {kind} model of Hugging Face's transformers, not of rwkvx: "
            f"rwkvx lm-eval run --model hf --model_args pretrained=FOLDER --tasks TASKS takes it"
        ) from error


def tokenizer_folder(named: str) -> str | None:
    """What `AutoTokenizer` can load the tokenizer of a model from: its folder, if it is one."""
    path = find_model(named)
    return str(path) if path.is_dir() else None
