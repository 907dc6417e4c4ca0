"""Opens whatever `--model` names: one of ours, a Hugging Face folder, or an endpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rwkvx
from rwkvx.checkpoint.formats import detect
from rwkvx.checkpoint.hub import MODEL_TYPE
from rwkvx.checkpoint.load import usable_device
from rwkvx.errors import InputError
from rwkvx.tokenizers import TOKENIZERS, get_tokenizer
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
    if is_hugging_face(Path(model).expanduser()):
        from rwkvx_evals.models.hugging_face import load_hugging_face

        if options.device_map is None:
            usable_device(options.device)
        words = open_tokenizer(options.tokenizer) if options.tokenizer else None
        return load_hugging_face(
            Path(model).expanduser(), device=options.device, dtype=options.dtype,
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
    return OwnModel(loaded, Path(model).name or model, max_length=options.max_length)


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
    if not Path(name).is_dir():
        known = ", ".join(TOKENIZERS)
        raise InputError(f"--tokenizer {name!r} is neither {known} nor a folder with a tokenizer")
    from transformers import AutoTokenizer

    try:
        loaded: Tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True)
    except Exception as error:  # as many kinds as there are files that can be damaged
        said = " ".join(str(error).split())[:200]
        raise InputError(f"transformers cannot load a tokenizer from {name}: {said}") from error
    return loaded


def is_hugging_face(folder: Path) -> bool:
    """Whether transformers is to load a folder: its config names a type, which is not ours."""
    file = folder / "config.json"
    if not file.is_file():
        return False
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # our own reader says what is wrong with it
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(kind, str) or kind == MODEL_TYPE:
        return False
    return detect(folder).TITLE == "folder of rwkvx"  # no format of ours claims it
