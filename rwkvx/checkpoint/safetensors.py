"""safetensors files: eight bytes with the length of a JSON header, the header, then the numbers."""

import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from rwkvx.checkpoint.foreign import by_start
from rwkvx.checkpoint.stored import Stored, start_of
from rwkvx.errors import InputError, shown
from rwkvx.files import JSON_BYTES, open_regular, parse_json, replacing

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


def is_safetensors(path: Path) -> bool:
    """Whether a regular file begins as one."""
    start = start_of(path)
    return start[8:9] == b"{" and 2 <= struct.unpack("<Q", start[:8])[0] < 1 << 40


def stored_in_safetensors(path: Path) -> dict[str, Stored]:
    """Where the tensors of a file lie in it; only its header is read.

    Raises:
        InputError: no safetensors file, or one that is cut short or damaged.
    """
    with open_regular(path) as file:
        size, start = os.fstat(file.fileno()).st_size, file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:
            words = (
                by_start(start + file.read(24)) or "truncated or damaged, or no safetensors file"
            )
            raise InputError(f"{path} is {words}")
        if length > JSON_BYTES:
            raise InputError(f"{path} is damaged: a header of {length:,} bytes is none of a model")
        content = file.read(length)
    try:
        header = parse_json(content, "its JSON")
        del content
        header.pop("__metadata__", None)
        stored = {name: _stored(x, 8 + length) for name, x in header.items()}
    except ValueError as error:
        raise InputError(f"{path} has a damaged safetensors header: {error}") from None
    except (LookupError, TypeError, AttributeError):
        raise InputError(f"{path} has a damaged safetensors header: no tensors in it") from None
    end = max((x.end for x in stored.values()), default=8 + length)
    if size != end:
        raise InputError(
            f"{path} is truncated or damaged: it has {size} bytes, its header tells of {end}"
        )
    return stored


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, from the tensors' own memory.

    Raises:
        WriteError: the disk refuses; then there is no file, or the old one.
    """
    flat, used = {}, set()
    for name, x in tensors.items():
        own = x.detach().cpu().contiguous()
        # Under two names, the format needs two of them.
        flat[name] = own.clone() if own.data_ptr() in used else own
        used.add(own.data_ptr())
    with replacing(path) as temporary:
        try:
            save_file(flat, temporary, metadata={"format": "pt"})
        except SafetensorError as error:  # its words for an OSError
            raise OSError(str(error)) from error


def _stored(x: Mapping[str, Any], base: int) -> Stored:
    if x["dtype"] not in _DTYPES:
        raise ValueError(f"numbers of the type {shown(x['dtype'])} are not read")
    begin, end = x["data_offsets"]
    if type(begin) is not int or type(end) is not int or not 0 <= begin <= end < 1 << 62:
        raise ValueError(f"data_offsets are {shown(x['data_offsets'])}")
    stored = Stored(_DTYPES[x["dtype"]], tuple(x["shape"]), base + begin, base + end)
    if not all(type(n) is int for n in stored.shape) or stored.bytes != end - begin:
        raise ValueError(f"{shown(x['shape'])} of {x['dtype']} does not take {end - begin:,} bytes")
    return stored
