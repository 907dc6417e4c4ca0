"""Tensors of a `.pth` file as `torch.save` writes it, in an archive (since torch 1.6) or plain.

The pickle in it is read as data (`unpickle.py`), and memory is asked for when all is known.
"""

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from rwkvx.checkpoint.stored import Stored
from rwkvx.checkpoint.unpickle import OTHER_TENSORS, CodeError, Described, Other, Unpickler
from rwkvx.errors import InputError, shown
from rwkvx.files import open_regular

ZIP, PICKLE = b"PK\x03\x04", b"\x80"  # first bytes: as torch writes since 1.6, and before
PICKLE_BYTES = 16_000_000  # of names and shapes: 130 bytes a tensor
DIRECTORY_BYTES = 16_000_000
_PLAIN_FLAGS = 0x0808  # sizes that stand behind the data, names in UTF-8; others mean ciphers
_BLOCK = 1 << 20
_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
# Where training frameworks put the weights of a checkpoint.
_PLACES = ("state_dict", "model_state_dict", "model", "module", "weights", "params", "net", "ema")


class Pickled(NamedTuple):
    """What a `.pth` file holds: plain values with `Described` tensors, and where storages lie."""

    value: Any
    spans: dict[str, tuple[int, int]]

    def stored(self, x: Described) -> Stored:
        """Where a tensor lies in the file; ValueError where its storage is missing or too short."""
        if x.storage.key not in self.spans:
            raise ValueError(f"the numbers of storage {shown(x.storage.key)} are missing")
        start, size = self.spans[x.storage.key]
        if x.storage.length * x.storage.dtype.itemsize > size:
            raise ValueError(f"storage {shown(x.storage.key)} has {size:,} bytes, which is too few")
        first = start + x.offset * x.dtype.itemsize
        return Stored(x.dtype, x.shape, first, start + size, _unless_contiguous(x))


def read_pickled(path: Path) -> Pickled:
    """What a `.pth` file holds; no number of a tensor is read.

    Raises:
        InputError: code, a damaged or truncated file, another format.
    """
    with open_regular(path) as file, _in_one_line(path):
        return _read_archive(file, path) if file.read(4) == ZIP else _read_plain(file)


@contextmanager
def _in_one_line(path: Path) -> Iterator[None]:
    """Whatever is met in a damaged file is an InputError that names it."""
    try:
        yield
    except InputError:
        raise
    except CodeError as error:
        raise InputError(
            f"{path} holds code ({error}), not only tensors; nothing of it was executed. Save the "
            "model's state_dict() alone"
        ) from error
    # The standard library's readers of archives and operations raise anything.
    except Exception as error:
        spoken = isinstance(error, ValueError | OSError | zipfile.BadZipFile)
        reason = error if spoken else "it does not hold together"
        raise InputError(f"{path} is truncated or damaged: {reason}") from error


def stored_in_pickle(path: Path) -> dict[str, Stored]:
    """Where the tensors of a state dict lie in a `.pth` file; also of one inside a checkpoint.

    Raises:
        InputError: as `read_pickled`, or there are no tensors by name.
    """
    pickled = read_pickled(path)
    named = _state_dict(pickled.value)
    if not named:
        raise InputError(f"{path} does not hold tensors by name")
    stored = {}
    for name, x in named.items():
        if isinstance(x, Other):
            raise InputError(f"{path}: {shown(name)} is {x.words}, expected a plain one")
        try:
            stored[name] = pickled.stored(x)
        except ValueError as error:
            raise InputError(f"{path} is truncated or damaged: {error}") from error
    return stored


class Part(NamedTuple):
    """Where a part of an archive lies, and its CRC-32."""

    start: int
    size: int
    crc: int


def archive_parts(file: IO[bytes], path: Path) -> dict[str, Part]:
    """What an archive holds by name: as it is, one after the other.

    Raises:
        InputError: something is compressed, encrypted, overlaps or lies outside.
        zipfile.BadZipFile: and others, for a damaged directory.
    """
    size = os.fstat(file.fileno()).st_size
    parts: dict[str, Part] = {}
    with zipfile.ZipFile(_Sparing(file)) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise InputError(f"{path} is a TorchScript program: save the model's state_dict() instead")
    free = 0
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & ~_PLAIN_FLAGS:
            raise InputError(
                f"{path} is compressed inside, which torch.save never does: load it with torch and "
                "save it again"
            )
        file.seek(entry.header_offset)
        header = file.read(30)
        start = entry.header_offset + 30 + sum(struct.unpack("<2H", header[26:30]))
        if header[:4] != ZIP or start < free or start + entry.file_size > size:
            raise ValueError(f"its part {shown(entry.filename)} does not lie where it should")
        if entry.filename in parts:
            raise ValueError(f"it holds {shown(entry.filename)} twice")
        parts[entry.filename] = Part(start, entry.file_size, entry.CRC)
        free = start + entry.file_size
    return parts


def damaged_part(path: Path) -> tuple[str | None, int]:
    """The name of a part of an archive whose CRC-32 does not hold, and how many parts there are.

    Raises:
        InputError: as `read_pickled`.
    """
    with open_regular(path) as file, _in_one_line(path):
        parts = archive_parts(file, path)
        for name, part in parts.items():
            file.seek(part.start)
            found = 0
            for start in range(0, part.size, _BLOCK):
                found = zlib.crc32(file.read(min(_BLOCK, part.size - start)), found)
            if found != part.crc:
                return name, len(parts)
    return None, len(parts)


def _state_dict(value: Any, depth: int = 3) -> dict[str, Any]:
    """Tensors by name: `value` itself, or the first of the usual places in it that has any."""
    if not isinstance(value, dict):
        return {}
    for name in _PLACES if depth else ():
        if found := _state_dict(value.get(name), depth - 1):
            return found
    return {n: x for n, x in value.items() if isinstance(n, str) and _is_tensor(x)}


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Described) or (isinstance(x, Other) and x.words in OTHER_TENSORS.values())


def _read_archive(file: IO[bytes], path: Path) -> Pickled:
    parts = archive_parts(file, path)
    roots = [name[: -len("data.pkl")] for name in parts if name.endswith("data.pkl")]
    if len(roots) != 1:
        raise InputError(f"{path} is a zip archive, but none that torch.save has written")
    root = roots[0]
    order = _content(file, parts.get(f"{root}byteorder", Part(0, 0, 0)), 16)
    if order not in (b"", b"little"):
        raise InputError(f"{path} has the byte order {shown(order)}, this machine's is little")
    machine = Unpickler(io.BytesIO(_content(file, parts[f"{root}data.pkl"], PICKLE_BYTES)))
    prefix = f"{root}data/"
    named = {n.removeprefix(prefix): part for n, part in parts.items() if n.startswith(prefix)}
    spans = {name: (part.start, part.size) for name, part in named.items()}
    return Pickled(machine.run(), spans)


def _read_plain(file: IO[bytes]) -> Pickled:
    """Pickles (magic number, version, system, the value, keys of storages), then the storages."""
    file.seek(0)
    head = io.BytesIO(file.read(PICKLE_BYTES))
    if Unpickler(head).run() != _LEGACY_MAGIC or Unpickler(head).run() != _LEGACY_VERSION:
        raise ValueError("it does not begin as torch.save begins a file")
    if Unpickler(head).run()["little_endian"] is not True:
        raise ValueError("it was written on a big-endian machine")
    machine = Unpickler(head)
    value, keys = machine.run(), Unpickler(head).run()
    size, at, spans = os.fstat(file.fileno()).st_size, head.tell(), {}
    for key in keys:
        file.seek(at)
        (count,) = struct.unpack("<q", file.read(8))
        length = count * machine.storages[key].dtype.itemsize
        if not 0 <= length <= size - at - 8:
            raise ValueError(f"storage {shown(key)} reaches beyond the end of the file")
        spans[key] = (at + 8, length)
        at += 8 + length
    return Pickled(value, spans)


def _content(file: IO[bytes], part: Part, most: int) -> bytes:
    if part.size > most:
        raise ValueError(f"{part.size:,} bytes where there should be a few")
    file.seek(part.start)
    return file.read(part.size)


def _unless_contiguous(x: Described) -> tuple[int, ...] | None:
    expected = 1
    for size, stride in zip(reversed(x.shape), reversed(x.strides), strict=False):
        if size > 1 and stride != expected:
            return x.strides
        expected *= max(size, 1)
    return None if len(x.shape) == len(x.strides) else x.strides


class _Sparing(io.RawIOBase):
    """A file that refuses to be read by the hundred megabytes: a directory is a small part."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file

    def seekable(self) -> bool:
        return True

    def seek(self, *args: int) -> int:
        return self.file.seek(*args)

    def tell(self) -> int:
        return self.file.tell()

    def read(self, size: int = -1) -> bytes:
        if size > DIRECTORY_BYTES:
            raise ValueError("its directory is larger than that of any model")
        return self.file.read(size)
