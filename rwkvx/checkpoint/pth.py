"""`.pth` files: BlinkDL's layout of RWKV-7, and that of RWKV-X (`rwkv.*` beside `moba.j.*`).

Sources: BlinkDL/RWKV-LM, RWKV-v7; howard-hou/RWKV-X.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkvx.checkpoint.checkpoint import Checkpoint
from rwkvx.checkpoint.fla import FLA
from rwkvx.checkpoint.foreign import by_names
from rwkvx.checkpoint.layout import BLOCK, Layout, Pattern, index_in_kind, without_prefix
from rwkvx.checkpoint.pickled import PICKLE, ZIP, damaged_part, stored_in_pickle
from rwkvx.checkpoint.safetensors import is_safetensors, stored_in_safetensors
from rwkvx.checkpoint.sidecar import keep_lost, with_sidecar
from rwkvx.checkpoint.stored import read_stored, start_of
from rwkvx.config import ModelConfig
from rwkvx.errors import InputError
from rwkvx.files import replacing
from rwkvx.kinds import KINDS

TITLE = ".pth of RWKV-7 (BlinkDL) or RWKV-X"
SUFFIXES: tuple[str, ...] = (".pth",)


def blinkdl_name(name: str, pattern: Pattern) -> str:
    """Name of one of our parameters in a file of pure RWKV-7."""
    return f"blocks.0.{name}" if name.startswith("ln0.") else name


def rwkvx_name(name: str, pattern: Pattern) -> str:
    """Name of one of our parameters in a file of RWKV-X."""
    if not (m := BLOCK.fullmatch(name)):
        return f"rwkv.{blinkdl_name(name, pattern)}"
    position = int(m[1])
    prefix = KINDS[pattern[position]].prefixes["rwkv-x"]
    return f"{prefix}{index_in_kind(position, pattern)}.{m[2]}"


_DEEP = re.compile(r"\.(x_[rwkvag]|[wav]0|k_k|k_a)$")
BLINKDL = Layout(
    name="blinkdl",
    rename=blinkdl_name,
    deep=_DEEP,
    transposed=False,
    unused=re.compile(r"blocks\.0\.att\.v[012]"),
)
RWKVX = Layout(
    name="rwkv-x",
    rename=rwkvx_name,
    deep=_DEEP,
    transposed=False,
    unused=re.compile(r"rwkv\.blocks\.0\.att\.v[012]"),
)


ANCHORS = {"rwkv.emb.weight": RWKVX, "emb.weight": BLINKDL, "model.embeddings.weight": FLA}


def matches(path: Path) -> bool:
    """Whether the file begins as `torch.save` begins one, or as safetensors."""
    start = start_of(path)
    return start[:4] == ZIP or start[:1] == PICKLE or is_safetensors(path)


def read(path: Path, overrides: Mapping[str, Any], meta: bool = False) -> Checkpoint:
    """Config and tensors; memory-mapped, or on the meta device with the weights unread.

    Sizes are read from the tensors. RWKV-X files do not tell chunk size and top-k: 2048 and 3,
    as released, unless overridden. Tensors by the names of flash-linear-attention are read too.

    Raises:
        InputError: not a file of tensors alone, damaged, or not of these layouts.
    """
    raw = read_tensors(path, meta)
    if "ln0.weight" in raw:
        raise InputError(f"{path} holds tensors by rwkvx's own names: name the folder they lie in")
    for anchor, layout in ANCHORS.items():
        if anchor in raw:
            return layout.read(raw, str(path), with_sidecar(path, overrides))
    if words := by_names(raw):
        raise InputError(f"{path} holds {words}")
    raise InputError(
        f"{path} does not hold an RWKV-7 or RWKV-X model (neither emb.weight nor rwkv.emb.weight)"
    )


def read_tensors(path: Path, meta: bool = False) -> dict[str, Tensor]:
    """The tensors of a `.pth` or safetensors file by their plain names.

    Raises:
        InputError: no such file, or damaged.
    """
    stored = stored_in_safetensors(path) if is_safetensors(path) else stored_in_pickle(path)
    return read_stored(path, without_prefix(stored), meta)


def write(checkpoint: Checkpoint, path: Path) -> str | None:
    """Write as RWKV-X stores a hybrid, or BlinkDL pure RWKV-7; dtypes as they are.

    Block 0 comes without its unused value residual. Fields of the config that no tensor tells, such
    as the chunk size, go to a sidecar; what is returned tells of them.

    Raises:
        InputError: the model has tensors that the layout has no names for.
        WriteError: the disk refuses; then there is no file, or the old one.
    """
    layout = layout_of(checkpoint.config)
    layout.check_place(checkpoint.config, "the .pth layout")
    raw = layout.write(checkpoint)
    with replacing(path) as temporary, temporary.open("wb") as file:
        # A view would bring the whole mapping it belongs to.
        own = {n: x if _owns_storage(x) else x.clone() for n, x in raw.items()}
        try:
            torch.save(own, file)
        except RuntimeError as error:  # torch's words for an OSError, whose cause it does not tell
            raise OSError(f"the disk is full or refuses ({_first_line(error)})") from error
    return keep_lost(checkpoint, path, TITLE, read)


def verify(path: Path) -> str:
    """Check the CRC-32 that the file carries for each of its tensors; what was checked.

    Raises:
        InputError: one does not hold, or there are none.
    """
    if start_of(path)[:4] != ZIP:
        raise InputError(f"{path} carries no checksums")
    damaged, count = damaged_part(path)
    if damaged:
        raise InputError(f"{path} is damaged: the CRC-32 of its part {damaged} does not hold")
    return f"CRC-32 of {count} parts"


def layout_of(config: ModelConfig) -> Layout:
    """BlinkDL's where it has all kinds of block, else that of RWKV-X."""
    return BLINKDL if set(config.pattern) <= set(BLINKDL.kinds) else RWKVX


def _owns_storage(x: Tensor) -> bool:
    return x.untyped_storage().nbytes() == x.numel() * x.element_size()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
