"""The `.pth` layout of RWKV-X: `rwkv.*` beside `moba.j.*` (howard-hou/RWKV-X)."""

import pickle
import re
from pathlib import Path

import torch
from torch import Tensor

from rwkvx.checkpoint.files import replacing
from rwkvx.config import ModelConfig, hybrid_pattern
from rwkvx.errors import InputError
from rwkvx.model import Model

CHUNK_SIZE, TOPK = 2048, 3
_BLOCK = re.compile(r"(?:rwkv\.)?blocks\.(\d+)\.(.+)")
_SPARSE = re.compile(r"moba\.(\d+)\.(.+)")


def read_pth(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Config and tensors by our parameter names; sizes are read from the tensors.

    Raises:
        InputError: not a weights-only file, truncated, or not of this layout.
    """
    raw = _read(path)
    numbers = {int(m[1]) for name in raw if (m := _BLOCK.fullmatch(name))}
    sparse = {int(m[1]) for name in raw if (m := _SPARSE.fullmatch(name))}
    if not numbers or "rwkv.emb.weight" not in raw:
        raise InputError(f"{path} does not hold an RWKV-X model (no rwkv.emb.weight)")
    for prefix, found in (("rwkv.blocks", numbers), ("moba", sparse)):
        for missing in sorted(set(range(len(found))) - found):
            raise InputError(f"{path} lacks the block {prefix}.{missing}")
    pattern = hybrid_pattern(len(numbers), len(sparse))
    places = {kind: [i for i, p in enumerate(pattern) if p == kind] for kind in ("rwkv7", "sparse")}
    tensors = {}
    for name, x in raw.items():
        target = _rename(name, places)
        if target is not None:
            # Vectors are stored as [1, 1, C]; r_k is [H, N], also with one head.
            tensors[target] = x.flatten() if x.dim() == 3 else x
    return _config(path, raw, pattern), tensors


def write_pth(model: Model, path: Path) -> None:
    """Write the weights as RWKV-X stores them (block 0 without its unused value residual).

    Chunk size and top-k have no place in the file: a reader must be told them.

    Raises:
        InputError: the model has what the layout cannot hold.
        OSError: the disk refuses; then there is no file, or the old one.
    """
    config = model.config
    if reason := no_place_in_pth(config):
        raise InputError(f"the RWKV-X layout has no place for {reason}")
    raw = {}
    for name, x in model.state_dict().items():
        target, vector = _rwkvx_name(name, config.pattern), x.dim() == 1
        plain = target.endswith((".weight", ".bias"))
        raw[target] = x.detach().cpu().view(1, 1, -1) if vector and not plain else x.detach().cpu()
    with replacing(path) as temporary:
        torch.save({name: x.contiguous() for name, x in raw.items()}, temporary)


def no_place_in_pth(config: ModelConfig) -> str | None:
    """What of a model the layout cannot hold, None if it holds everything."""
    rwkv_blocks, sparse_blocks = (config.pattern.count(x) for x in ("rwkv7", "sparse"))
    if not rwkv_blocks:
        return "a model without RWKV-7 blocks"
    uneven = sparse_blocks and rwkv_blocks % sparse_blocks
    if uneven or config.pattern != hybrid_pattern(rwkv_blocks, sparse_blocks):
        return "this order of blocks"
    if config.key_conv and sparse_blocks:
        return "a key convolution"
    if config.kv_heads != config.heads and sparse_blocks:
        return "grouped-query heads"
    return None


def _rwkvx_name(name: str, pattern: tuple[str, ...]) -> str:
    """The inverse of `_rename`."""
    if name.startswith("ln0."):
        return f"rwkv.blocks.0.{name}"
    if not (m := _BLOCK.fullmatch(name)):
        return f"rwkv.{name}"
    position = int(m[1])
    kind = pattern[position]
    index = pattern[:position].count(kind)
    return f"rwkv.blocks.{index}.{m[2]}" if kind == "rwkv7" else f"moba.{index}.{m[2]}"


def _read(path: Path) -> dict[str, Tensor]:
    try:
        raw = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} holds more than tensors; nothing of it was executed: {_first_line(error)}"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise InputError(f"{path} is truncated or damaged: {_first_line(error)}") from error
    named = isinstance(raw, dict) and all(
        isinstance(name, str) and isinstance(x, Tensor) for name, x in raw.items()
    )
    if not named:
        raise InputError(f"{path} does not hold tensors by name")
    return raw


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def _rename(name: str, places: dict[str, list[int]]) -> str | None:
    """Our name of a tensor, None for the value residual that block 0 carries without using it."""
    if m := _SPARSE.fullmatch(name):
        return f"blocks.{places['sparse'][int(m[1])]}.{m[2]}"
    if m := _BLOCK.fullmatch(name):
        if int(m[1]) == 0 and re.fullmatch(r"att\.v[012]", m[2]):
            return None
        if m[2].startswith("ln0."):
            return m[2]
        return f"blocks.{places['rwkv7'][int(m[1])]}.{m[2]}"
    return name.removeprefix("rwkv.")


def _config(path: Path, raw: dict[str, Tensor], pattern: tuple[str, ...]) -> ModelConfig:
    def shape(name: str) -> torch.Size:
        if name not in raw:
            raise InputError(f"{path} lacks the tensor {name}")
        if raw[name].dim() != 2:
            raise InputError(f"{path}: {name} is {list(raw[name].shape)}, expected a matrix")
        return raw[name].shape

    vocab, width = shape("rwkv.emb.weight")
    att = "rwkv.blocks.0.att"
    later = "rwkv.blocks.1.att.v1"  # block 0 may have none
    return ModelConfig(
        vocab_size=vocab,
        width=width,
        pattern=pattern,
        head_size=shape(f"{att}.r_k")[-1],
        chunk_size=CHUNK_SIZE,
        topk=TOPK,
        ffn_mult=shape("rwkv.blocks.0.ffn.key.weight")[0] // width,
        decay_rank=shape(f"{att}.w1")[-1],
        iclr_rank=shape(f"{att}.a1")[-1],
        value_rank=raw[later].shape[-1] if later in raw else None,
        gate_rank=shape(f"{att}.g1")[-1],
        tokenizer="world" if vocab == 65536 else "bytes",
    )
