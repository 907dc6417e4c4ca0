"""What a folder needs beside config and weights for Hugging Face's Auto classes to load it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rwkvx.config import TOKENIZER_CONFIG, field_names
from rwkvx.files import is_there, read_mapping, write_json, write_text

MODEL_TYPE = "rwkvx"
TOKENIZER_CLASSES = {"world": "WorldTokenizer", "bytes": "ByteTokenizer"}
# Where Hugging Face keeps what is added to a tokenizer, beside TOKENIZER_CONFIG.
TOKENIZER_EXTRAS = (
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates",
)
_MODULE = "modeling_rwkvx"
_CODE = """\
# Loads this folder with trust_remote_code=True, through the installed package: pip install rwkvx
from rwkvx.hf import ByteTokenizer, RwkvxConfig, RwkvxForCausalLM, WorldTokenizer  # noqa: F401
"""
AUTO_MAP = {
    "AutoConfig": f"{_MODULE}.RwkvxConfig",
    "AutoModelForCausalLM": f"{_MODULE}.RwkvxForCausalLM",
}
# Of config.json, beside the fields of `ModelConfig`.
CONFIG_KEYS: dict[str, Any] = {
    "architectures": ["RwkvxForCausalLM"],
    "auto_map": AUTO_MAP,
    "model_type": MODEL_TYPE,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    # Nothing in the model ends anywhere. lm-eval's `hf` cuts prompts to this length, with a
    # warning, and tries batches of 64 times as much to find the batch size by itself.
    "max_position_embeddings": 8192,
}


def special_ids(tokenizer: Any) -> dict[str, int]:
    """Of config.json: the special ids of a tokenizer that is a file; none for None."""
    if tokenizer is None:
        return {}
    return {f"{x}_token_id": getattr(tokenizer, f"{x}_token_id") for x in ("bos", "eos", "pad")}


def own_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a config.json is for `ModelConfig`: all, unless Hugging Face put its own beside."""
    own = field_names()
    return {k: v for k, v in config.items() if k in own or config.get("model_type") != MODEL_TYPE}


def tokenizer_auto_map(name: str) -> dict[str, Any]:
    """The `auto_map` of tokenizer_config.json for the tokenizer class of that name."""
    return {"AutoTokenizer": [f"{_MODULE}.{name}", None]}


def tokenizer_is_described(folder: Path, tokenizer: str | None) -> bool:
    """Whether a folder says more of a tokenizer of ours than `write_hub_files` does.

    A description of a class that is not ours belongs to code that is not run here: it is left.

    Raises:
        InputError: tokenizer_config.json is damaged.
    """
    if tokenizer not in TOKENIZER_CLASSES:
        return False
    path, own = folder / TOKENIZER_CONFIG, TOKENIZER_CLASSES[tokenizer]
    data = read_mapping(path) if is_there(path) else {}
    if data.get("tokenizer_class", own) != own:
        return False
    more = set(data) - {"auto_map", "tokenizer_class"}
    return bool(more) or any(is_there(folder / name) for name in TOKENIZER_EXTRAS)


def write_code(folder: Path) -> str:
    """The Python file that `auto_map` names, nothing but an import; returns its name."""
    write_text(folder / f"{_MODULE}.py", _CODE)
    return f"{_MODULE}.py"


def write_hub_files(folder: Path, tokenizer: str | None) -> str:
    """The code and, unless there is one, the tokenizer's description; returns the code's name."""
    path = folder / TOKENIZER_CONFIG
    if tokenizer in TOKENIZER_CLASSES and not path.exists():
        name = TOKENIZER_CLASSES[tokenizer]
        write_json(path, {"auto_map": tokenizer_auto_map(name), "tokenizer_class": name})
    return write_code(folder)
