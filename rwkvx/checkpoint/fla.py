"""Hugging Face folders of flash-linear-attention's RWKV7 (`fla.models.rwkv7`), pure RWKV-7 only."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rwkvx.checkpoint.checkpoint import Checkpoint
from rwkvx.checkpoint.folder import CONFIG, read_json, tokenizer_beside, write_tokenizer
from rwkvx.checkpoint.hub import special_ids
from rwkvx.checkpoint.layout import BLOCK, Layout, Pattern, without_prefix
from rwkvx.checkpoint.manifest import verify_manifest, write_manifest
from rwkvx.checkpoint.shards import SHARD_BYTES, read_weights, remove_other_weights, write_weights
from rwkvx.checkpoint.sidecar import keep_lost, with_sidecar
from rwkvx.config import TOKENIZER_FILE, TOKENIZER_JSON, ModelConfig
from rwkvx.errors import InputError, shown
from rwkvx.files import is_there, replacing_folder, write_json

TITLE = "Hugging Face folder of flash-linear-attention"
SUFFIXES: tuple[str, ...] = ()  # a plain folder is our own
NORM_EPS = 1e-5  # of every layer norm; that of the group norm is this times the head size
_OUTER = {
    "emb.weight": "model.embeddings.weight",
    "ln0.weight": "model.layers.0.pre_norm.weight",
    "ln0.bias": "model.layers.0.pre_norm.bias",
    "ln_out.weight": "model.norm.weight",
    "ln_out.bias": "model.norm.bias",
    "head.weight": "lm_head.weight",
}
_PARTS = {
    "ln1": "attn_norm",
    "ln2": "ffn_norm",
    "att.receptance": "attn.r_proj",
    "att.key": "attn.k_proj",
    "att.value": "attn.v_proj",
    "att.output": "attn.o_proj",
    "att.ln_x": "attn.g_norm",
}
_LOW_RANK = {"0": "lora.2.bias", "1": "lora.0.weight", "2": "lora.2.weight"}
_MIXES = "rwkvag"  # the order in which older files pack them as x_x [6, C]


def fla_name(name: str, pattern: Pattern) -> str:
    """Name of one of our parameters in a file of fla."""
    if not (m := BLOCK.fullmatch(name)):
        return _OUTER[name]
    layer, rest = f"model.layers.{m[1]}", m[2]
    if low := re.fullmatch(r"att\.([wavg])([012])", rest):
        return f"{layer}.attn.{low[1]}_lora.{_LOW_RANK[low[2]]}"
    part, _, last = rest.rpartition(".")
    if part in _PARTS:
        return f"{layer}.{_PARTS[part]}.{last}"
    return f"{layer}.{re.sub('^att', 'attn', rest)}"


FLA = Layout(
    name="fla",
    rename=fla_name,
    deep=re.compile(r"\.att\.x_[rwkvag]$"),
    transposed=True,
    unused=re.compile(r"model\.layers\.0\.attn\.v_lora\..*"),
)


def matches(path: Path) -> bool:
    """Whether this is a folder whose config.json says so."""
    try:
        return path.is_dir() and read_json(path).get("model_type") == "rwkv7"
    except InputError:
        return False


def read(folder: Path, overrides: Mapping[str, Any], meta: bool = False) -> Checkpoint:
    """Config and tensors; memory-mapped (the low-rank matrices copied), or only headers read.

    Raises:
        InputError: damaged files, tensors that do not fit, or a config that is no plain RWKV-7.
    """
    origin, data = str(folder), read_json(folder)
    if data.get("attn"):
        raise InputError(f"{origin} has attention layers of fla's own (attn in {CONFIG})")
    for name, ours in (("norm_eps", NORM_EPS), ("hidden_act", "sqrelu")):
        if data.get(name, ours) != ours:
            raise InputError(f"{origin}: {name} is {shown(data[name])}, RWKV-7 has {ours!r}")
    raw = _unpack(without_prefix(read_weights(folder, meta)))
    embedding, head = _OUTER["emb.weight"], _OUTER["head.weight"]
    if data.get("tie_word_embeddings") and head not in raw and embedding in raw:
        raw[head] = raw[embedding].clone()
    layers = data.get("num_hidden_layers")
    known: dict[str, Any] = {}
    if is_there(folder / TOKENIZER_JSON):
        known["tokenizer"] = TOKENIZER_FILE
    if (r_k := raw.get("model.layers.0.attn.r_k")) is not None and r_k.dim() == 2:
        known["group_norm_eps"] = _group_norm_eps(r_k.shape[1])
    checkpoint = FLA.read(raw, origin, with_sidecar(folder, overrides), **known)
    found = len(checkpoint.config.pattern)
    if layers is not None and layers != found:
        raise InputError(f"{origin} holds {found} blocks, its {CONFIG} tells of {shown(layers)}")
    return checkpoint._replace(tokenizer=tokenizer_beside(checkpoint.config, folder))


def write(checkpoint: Checkpoint, folder: Path) -> str | None:
    """Write weights, config and SHA-256 sums, in the layout of fla 0.3 and later; dtypes kept.

    Raises:
        InputError: sparse blocks.
        WriteError: the disk refuses; then nothing has changed.
    """
    FLA.check_place(checkpoint.config, "the layout of flash-linear-attention")
    with replacing_folder(folder) as temporary:
        written = write_weights(temporary, FLA.write(checkpoint), SHARD_BYTES)
        dtype = str(checkpoint.tensors["head.weight"].dtype).removeprefix("torch.")
        written += write_tokenizer(checkpoint, temporary)
        ends = special_ids(checkpoint.tokenizer)
        config = {**_config(checkpoint.config), **ends, "torch_dtype": dtype}
        write_json(temporary / CONFIG, config)
        write_manifest(temporary, [CONFIG, *written])
    remove_other_weights(folder, written)
    return keep_lost(checkpoint, folder, TITLE, read)


def verify(folder: Path) -> str:
    """Check SHA-256 sums, where the folder has any; what was checked."""
    return verify_manifest(folder)


def _group_norm_eps(head_size: int) -> float:
    """fla's, in place of RWKV-7's constant; the same at heads of 64."""
    default = ModelConfig.group_norm_eps
    eps = head_size * NORM_EPS
    return default if math.isclose(eps, default) else eps


def _unpack(raw: dict[str, Tensor]) -> dict[str, Tensor]:
    """Older files hold the six mixes of the time mix in one tensor."""
    tensors: dict[str, Tensor] = {}
    for name, x in raw.items():
        if name.endswith(".attn.x_x") and x.shape[:1] == (len(_MIXES),):
            rows = zip(_MIXES, x, strict=True)
            tensors |= {f"{name.removesuffix('x')}{mix}": row for mix, row in rows}
        else:
            tensors[name] = x
    return tensors


def _config(config: ModelConfig) -> dict[str, Any]:
    """config.json as fla's RWKV7Config reads it."""
    ranks, layers = config.ranks, len(config.pattern)
    return {
        "architectures": ["RWKV7ForCausalLM"],
        "model_type": "rwkv7",
        "attn": None,
        "attn_mode": "chunk",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "hidden_ratio": float(config.ffn_mult),
        "intermediate_size": config.ffn_mult * config.width,
        "num_hidden_layers": layers,
        "head_dim": config.head_size,
        "num_heads": config.heads,
        "value_dim": [config.width] * layers,
        "decay_low_rank_dim": ranks["w"],
        "a_low_rank_dim": ranks["a"],
        "v_low_rank_dim": ranks["v"],
        "gate_low_rank_dim": ranks["g"],
        "hidden_act": "sqrelu",
        "norm_first": True,
        "norm_bias": True,
        "norm_eps": NORM_EPS,
        "fuse_norm": False,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
