"""Opens whatever `--model` names: one of ours, a Hugging Face folder, or an endpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rwkvx
from rwkvx.checkpoint import folder as own_folder
from rwkvx.checkpoint.formats import detect
from rwkvx.checkpoint.hub import MODEL_TYPE
from rwkvx.checkpoint.load import usable_device
from rwkvx.errors import InputError, shown
from rwkvx.files import read_json, user_path
from rwkvx.tokenizers import TOKENIZERS, get_tokenizer
from rwkvx_evals.folder import model_label
from rwkvx_evals.interface import Tokenizer
from rwkvx_evals.models.endpoint import TIMEOUT, Endpoint, open_endpoint
from rwkvx_evals.models.own import OwnModel
from rwkvx_evals.models.reader import Reader


@dataclass(frozen=True)
class Options:
    """How to open a model; each kind of model refuses what it has no use for.

    Attributes:
        tokenizer: "world", "bytes" or a Hugging Face folder, in place of the model's own.
        model_name: at an endpoint. device_map, trust: of Hugging Face models; `trust` lets code
            in the folder run.
        max_length: tokens, in place of what the model says.
    """

    device: str = "cpu"
    dtype: str = "float32"
    tokenizer: str | None = None
    chat: bool = False
    max_length: int | None = None
    model_name: str | None = None
    timeout: float = TIMEOUT
    device_map: str | None = None
    trust: bool = False


def open_model(model: str, options: Options) -> Reader | Endpoint:
    """A model by shipped name, path or address. Raises InputError with what does not fit."""
    if model.startswith(("http://", "https://")):
        return _open_endpoint(model, options)
    if options.model_name is not None:
        raise InputError("--model-name is for endpoints: --model http://HOST:PORT/v1")
    path = user_path(model)
    if kind_of_others(path) is not None:
        from rwkvx_evals.models.hugging_face import load_hugging_face

        if options.device_map is None:
            usable_device(options.device)
        words = open_tokenizer(options.tokenizer) if options.tokenizer else None
        return load_hugging_face(
            path, device=options.device, dtype=options.dtype,
            device_map=options.device_map, tokenizer=words, chat=options.chat,
            trust=options.trust, max_length=options.max_length,
        )  # fmt: skip
    for name, value in (("--device-map", options.device_map), ("--chat-template", options.chat)):
        if value:
            raise InputError(f"{name} is for Hugging Face folders, and {model} is none")
    overrides: dict[str, Any] = {}
    if options.tokenizer:
        if options.tokenizer not in TOKENIZERS:
            raise InputError(f"--tokenizer of a model of ours is one of {', '.join(TOKENIZERS)}")
        overrides["tokenizer"] = options.tokenizer
    loaded = rwkvx.load(model, device=options.device, dtype=options.dtype, **overrides)
    return OwnModel(loaded, model_label(model), max_length=options.max_length)


def _open_endpoint(url: str, options: Options) -> Endpoint:
    if options.tokenizer is None:
        raise InputError(
            "an endpoint needs --tokenizer world, bytes or the folder of its own tokenizer: "
            "lengths are counted with it"
        )
    return open_endpoint(
        url, options.model_name, open_tokenizer(options.tokenizer), chat=options.chat,
        timeout=options.timeout, max_length=options.max_length,
    )  # fmt: skip


def open_tokenizer(name: str) -> Tokenizer:
    """ "world", "bytes", or a Hugging Face folder. Raises InputError for anything else."""
    if name in TOKENIZERS:
        found: Tokenizer = get_tokenizer(name)
        return found
    folder = user_path(name)
    if not folder.is_dir():
        known = ", ".join(TOKENIZERS)
        raise InputError(
            f"--tokenizer {shown(name)} is neither {known} nor a folder with a tokenizer"
        )
    from transformers import AutoTokenizer

    try:
        loaded: Tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # as many kinds as there are files that can be damaged
        said = " ".join(str(error).split())[:200]
        raise InputError(f"transformers cannot load a tokenizer from {name}: {said}") from error
    return loaded


def kind_of_others(path: Path) -> str | None:
    """The model type of a folder that transformers is to load: one that no format of ours claims.

    None for ours, and for what is damaged: our own reader says what is wrong with it.
    """
    try:
        if not path.is_dir() or detect(path) is not own_folder:
            return None
        config = read_json(path / own_folder.CONFIG)
    except InputError:
        return None
    kind = config.get("model_type") if isinstance(config, dict) else None
    return kind[:40] if isinstance(kind, str) and kind != MODEL_TYPE else None
