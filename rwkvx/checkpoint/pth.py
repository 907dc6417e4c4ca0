"""`.pth` files: BlinkDL's layout of RWKV-7, and that of RWKV-X (`rwkv.*` beside `moba.j.*`).

Sources: BlinkDL/RWKV-LM, RWKV-v7; howard-hou/RWKV-X.
"""

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkvx.checkpoint.checkpoint import Checkpoint
from rwkvx.checkpoint.files import replacing
from rwkvx.checkpoint.layout import BLOCK, Layout, Pattern, index_in_kind
from rwkvx.config import ModelConfig
from rwkvx.errors import InputError
from rwkvx.kinds import KINDS

TITLE = ".pth of RWKV-7 (BlinkDL) or RWKV-X"
SUFFIXES: tuple[str, ...] = (".pth",)
ZIP, PICKLE = b"PK\x03\x04", b"\x80"  # first bytes: as torch writes since 1.6, and before


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


def matches(path: Path) -> bool:
    """Whether the file begins as `torch.save` begins one."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(4)
    return start == ZIP or start[:1] == PICKLE


def read(path: Path, overrides: Mapping[str, Any], meta: bool = False) -> Checkpoint:
    """Config and tensors; memory-mapped, or on the meta device with the weights unread.

    Sizes are read from the tensors. RWKV-X files do not tell chunk size and top-k: 2048 and 3,
    as released, unless overridden.

    Raises:
        InputError: not a weights-only file, damaged, or not of these layouts.
    """
    raw = _load(path, meta)
    if "rwkv.emb.weight" in raw:
        return RWKVX.read(raw, str(path), overrides)
    if "emb.weight" in raw:
        return BLINKDL.read(raw, str(path), overrides)
    raise InputError(
        f"{path} does not hold an RWKV-7 or RWKV-X model (neither emb.weight nor rwkv.emb.weight)"
    )


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Write as RWKV-X stores a hybrid, or BlinkDL pure RWKV-7; dtypes as they are.

    Block 0 comes without its unused value residual. Chunk size and top-k have no place in the
    file: a reader must be told them.

    Raises:
        InputError: the model has what the layout cannot hold.
        OSError: the disk refuses; then there is no file, or the old one.
    """
    layout = layout_of(checkpoint.config)
    if reason := layout.no_place(checkpoint.config):
        raise InputError(f"the .pth layout has no place for {reason}")
    raw = layout.write(checkpoint)
    with replacing(path) as temporary:
        # A view would bring the whole mapping it belongs to.
        torch.save({n: x if _owns_storage(x) else x.clone() for n, x in raw.items()}, temporary)


def verify(path: Path) -> str:
    """Check the CRC-32 that the file carries for each of its tensors; what was checked.

    Raises:
        InputError: one does not hold, or there are none.
    """
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path} carries no checksums, or is truncated")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged, count = archive.testzip(), len(archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise InputError(f"{path} is damaged: {_first_line(error)}") from error
    if damaged:
        raise InputError(f"{path} is damaged: the CRC-32 of its part {damaged} does not hold")
    return f"CRC-32 of {count} parts"


def layout_of(config: ModelConfig) -> Layout:
    """BlinkDL's where it has all kinds of block, else that of RWKV-X."""
    return BLINKDL if set(config.pattern) <= set(BLINKDL.kinds) else RWKVX


def _load(path: Path, meta: bool) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():  # of torch, about unusual pickles: what fails is said here
            warnings.simplefilter("ignore")
            raw = _unpickle(path, meta)
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} {_why_not(error)}") from error
    except Exception as error:  # damaged pickles fail in any way
        raise InputError(f"{path} is truncated or damaged: {_first_line(error)}") from error
    named = isinstance(raw, dict) and all(
        isinstance(name, str) and isinstance(x, Tensor) for name, x in raw.items()
    )
    if not named:
        raise InputError(f"{path} does not hold tensors by name")
    return raw


def _unpickle(path: Path, meta: bool) -> Any:
    if meta:
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            raw = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(raw, dict):
            return raw
        return {
            name: torch.empty(x.shape, dtype=x.dtype, device="meta") if _is_tensor(x) else x
            for name, x in raw.items()
        }
    with path.open("rb") as file:
        mappable = file.read(4) == ZIP
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


def _owns_storage(x: Tensor) -> bool:
    return x.untyped_storage().nbytes() == x.numel() * x.element_size()


def _why_not(error: Exception) -> str:
    """What a pickle holds beside tensors, from torch's many lines about it."""
    if found := re.search(r"GLOBAL (\S+)", str(error)):
        return f"holds code ({found[1]}), not only tensors; nothing of it was executed"
    found = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
    reason = found[1][:200] if found else _first_line(error)
    return f"holds more than tensors, or is damaged; nothing was executed: {reason}"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
