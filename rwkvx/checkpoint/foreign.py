"""Files and folders that are something else than a model of ours: what they are, and what to do.

Every function here answers in words that follow "is" or "holds", or None for what it does not know.
"""

import re
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from rwkvx.errors import InputError, shown
from rwkvx.files import read_json

_OTHER_RWKV = "only RWKV-7 is read: get a file of RWKV-7, such as rwkv7-g1-0.1b"
# First bytes of a file. The longest come first.
_STARTS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself: run `git lfs pull`"),
    (b"GGUF", "a GGUF file of llama.cpp: take the .pth or Hugging Face folder it was made from"),
    (b"ggjt", "a ggml file of old llama.cpp: take the checkpoint it was made from"),
    (b"tjgg", "a ggml file of old llama.cpp: take the checkpoint it was made from"),
    (b"\x89HDF", "an HDF5 file of Keras: take the PyTorch checkpoint"),
    (b"\x93NUMPY", "a NumPy array, not a model"),
    (b"\x1f\x8b", "compressed by gzip: unpack it first"),
    (b"\xfd7zXZ", "compressed by xz: unpack it first"),
    (b"BZh", "compressed by bzip2: unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it first"),
    (b"Rar!", "a RAR archive: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd: unpack it first"),
    (b"<!DOCTYPE", "a web page, not the file: download it again"),
    (b"<html", "a web page, not the file: download it again"),
    (b"{", "JSON: name the folder it lies in"),
)
# Names of tensors that another kind of model has, wherever they stand in a name.
_NAMES: tuple[tuple[str, str], ...] = (
    (
        r"\blora_(A|B|embedding_[AB])\b",
        "a LoRA adapter, not a model: merge it into its model first",
    ),
    (r"time_maa_", f"RWKV-6; {_OTHER_RWKV}"),
    (r"time_(faaaa|mix_g)\b", f"RWKV-5; {_OTHER_RWKV}"),
    (r"time_first\b.*\bln_x\.", f"RWKV-5; {_OTHER_RWKV}"),
    (r"time_(first|decay|mix_k)\b", f"RWKV-4; {_OTHER_RWKV}"),
    (r"\b(s_emb|k_emb|v_emb)\b", "RWKV-7 with deep embeddings, which is not read"),
    (
        r"\b(qweight|qzeros|weight_scale|weight_scale_inv|SCB|absmax)\b",
        "quantised weights: take the model they were made from",
    ),
    (r"\b(exp_avg|exp_avg_sq)\b", "the state of an optimiser, not a model"),
    (
        r"\b(self_attn|c_attn|query_key_value|q_proj|attention\.self)\b",
        "a Transformer: use transformers for it; RWKV-7 is read here",
    ),
    (r"\b(A_log|dt_bias|mixer)\b", "a Mamba model: use transformers for it; RWKV-7 is read here"),
)
_RWKV_TYPES = {"rwkv": "RWKV-4", "rwkv5": "RWKV-5", "rwkv6": "RWKV-6"}
_ADAPTER = "adapter_config.json"
_LISTED = 1000  # files of a folder that are looked at


def by_start(start: bytes) -> str | None:
    """What a file is, by its first bytes."""
    if not start.strip(b"\0"):
        return "empty" if not start else "zeros, not a model: download it again"
    return next((words for mark, words in _STARTS if start.lstrip().startswith(mark)), None)


def by_names(names: Iterable[str]) -> str | None:
    """What tensors of these names belong to."""
    text = " ".join(sorted(names, reverse=True))[:1_000_000]
    return next((words for pattern, words in _NAMES if re.search(pattern, text)), None)


def by_config(config: Mapping[str, Any]) -> str | None:
    """What a config.json of Hugging Face describes, if not a model that is read here."""
    kind, classes = config.get("model_type"), config.get("architectures")
    if kind in _RWKV_TYPES:
        return f"{_RWKV_TYPES[kind]}; {_OTHER_RWKV}"
    if kind is None and classes is None:
        return None
    name = classes[0] if isinstance(classes, list) and classes else kind
    return f"a model of Hugging Face, {shown(name)}: use transformers for it; RWKV-7 is read here"


def by_folder(folder: Path) -> str | None:
    """What a folder without config.json is, from what lies in it."""
    if (folder / _ADAPTER).is_file():
        return f"a LoRA adapter{_base_of(folder)}: merge it into its model first (merge_and_unload)"
    try:
        inner = [path for path in islice(folder.iterdir(), _LISTED) if not path.is_symlink()]
    except OSError as error:
        return f"a folder that cannot be read ({error.strerror})"
    places = [*inner, *islice((folder / "snapshots").glob("*"), _LISTED)]  # of a cache of the hub
    if models := sorted(str(path) for path in places if (path / "config.json").is_file()):
        return f"a folder around models: name {models[0]}"
    for suffix in (".pth", ".pt", ".safetensors", ".bin"):
        if files := sorted(path.name for path in inner if path.suffix == suffix):
            return f"a folder without config.json: name the file {folder / files[0]}"
    if any(path.suffix == ".gguf" for path in inner):
        return "a folder of GGUF files of llama.cpp: take the checkpoint they were made from"
    return "an empty folder" if not inner else None


def _base_of(folder: Path) -> str:
    """The model that an adapter belongs to, if its config says so."""
    try:
        config = read_json(folder / _ADAPTER)
    except InputError:
        return ""
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    return f" of {shown(base)}" if isinstance(base, str) else ""
