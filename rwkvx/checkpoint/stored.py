"""Where tensors lie in a file, checked against its size before memory is asked for.

Every container (safetensors, `.pth`, ggml) is read into `Stored` by name, and from there one
function makes tensors: views of the file mapped into memory, where its bytes are aligned.
"""

import mmap
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from rwkvx.errors import InputError, shown
from rwkvx.files import open_regular

MOST_TENSORS = 1 << 16
_MOST_DIMS = 8
# Of a file's bytes: an embedding and a head may be one, and then all tensors together are larger.
_MOST_SHARING = 2


class Stored(NamedTuple):
    """A tensor in a file; nothing of it has been read.

    `start` is its first byte in the file, `end` the end of the bytes that it may lie in. `strides`
    are in elements, None for a contiguous tensor.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int
    strides: tuple[int, ...] | None = None

    @property
    def bytes(self) -> int:
        """What it takes once it is contiguous."""
        return int(prod(self.shape)) * self.dtype.itemsize


def read_stored(path: Path, stored: Mapping[str, Stored], meta: bool) -> dict[str, Tensor]:
    """The tensors of a file, mapped (writing to one does not reach the file), or on meta.

    Raises:
        InputError: one that does not lie in the file, or tensors that take more than it holds.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        _check(path, stored, size)
        if meta:
            return {
                n: torch.empty(s.shape, dtype=s.dtype, device="meta") for n, s in stored.items()
            }
        memory = _mapped(file, path) if size else b""
        tensors, used = {}, set()
        for name, x in stored.items():
            tensor = _tensor(file, memory, x)
            # What stands under two names becomes two: training one must not change the other.
            tensors[name] = tensor.clone() if x.start in used else tensor
            used.add(x.start)
        return tensors


def start_of(path: Path) -> bytes:
    """The first 64 bytes of a file, none of a folder; InputError for what is not a regular file."""
    if path.is_dir():
        return b""
    with open_regular(path) as file:
        return file.read(64)


def _check(path: Path, stored: Mapping[str, Stored], size: int) -> None:
    if len(stored) > MOST_TENSORS:
        raise InputError(f"{path} names {len(stored):,} tensors: no model has so many")
    for name, x in stored.items():
        strides = x.strides or ()
        whole = all(isinstance(n, int) and n >= 0 for n in (*x.shape, *strides, x.start, x.end))
        if (
            not whole
            or len(x.shape) > _MOST_DIMS
            or prod(max(1, n) for n in x.shape) >= 1 << 60
            or (strides and len(strides) != len(x.shape))
        ):
            raise InputError(f"{path} is damaged: {name} has the shape {shown(x.shape)}")
        last = sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True)) if strides else 0
        span = (last + 1) * x.dtype.itemsize if strides and x.bytes else x.bytes
        if x.start + span > min(x.end, size):
            raise InputError(
                f"{path} is truncated or damaged: {name} needs {_bytes(span)} from byte "
                f"{x.start:,} on, there are {_bytes(max(0, min(x.end, size) - x.start))}"
            )
    total = sum(x.bytes for x in stored.values())
    if total > _MOST_SHARING * size:
        raise InputError(
            f"{path} is damaged: its tensors would take {_bytes(total)}, the file has {size:,}"
        )


def _bytes(number: int) -> str:
    return f"{number:,} bytes" if number < 1 << 60 else f"2^{number.bit_length() - 1} bytes"


def _mapped(file: IO[bytes], path: Path) -> mmap.mmap:
    """The file in memory, private: pages that are written to are copied first."""
    flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
    try:
        return mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot map {path} into memory: {error}") from error


def _tensor(file: IO[bytes], memory: Any, x: Stored) -> Tensor:
    count = prod(x.shape)
    if not count:
        return torch.empty(x.shape, dtype=x.dtype)
    if x.strides:
        count = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.strides, strict=True))
    if x.start % x.dtype.itemsize == 0:
        flat = torch.frombuffer(memory, dtype=x.dtype, count=count, offset=x.start)
    else:
        data = bytearray(count * x.dtype.itemsize)
        file.seek(x.start)
        file.readinto(data)  # type: ignore[attr-defined]
        flat = torch.frombuffer(data, dtype=x.dtype)
    return flat.as_strided(x.shape, x.strides) if x.strides else flat.view(x.shape)
