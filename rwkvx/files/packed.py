"""Text files, plain or compressed, of which no more is unpacked than was asked for."""

import bz2
import gzip
import io
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rwkvx.errors import InputError
from rwkvx.files.plain import decoded, open_regular

TEXT_BYTES = 128_000_000  # of one text, which is held as a whole: some thirty times War and Peace
_OPENERS: dict[str, Any] = {".xz": lzma.LZMAFile, ".gz": gzip.GzipFile, ".bz2": bz2.BZ2File}
_BLOCK = 1 << 20
_DAMAGE = (OSError, EOFError, lzma.LZMAError, zlib.error, tarfile.TarError, ValueError)


@contextmanager
def open_packed(path: Path, most: int) -> Iterator[IO[bytes]]:
    """A regular file as a stream, unpacked if its name ends in .xz, .gz or .bz2.

    Raises:
        InputError: as `open_regular`; a damaged file; more than `most` bytes were read.
    """
    with open_regular(path) as file:
        opener = _OPENERS.get(path.suffix)
        stream = file if opener is None else opener(file)
        try:
            yield io.BufferedReader(_Counted(stream, path, most), _BLOCK)
        except InputError:
            raise
        except _DAMAGE as error:
            raise InputError(f"cannot read {path}: {_reason(error)}") from error


def read_text(path: Path, most: int = TEXT_BYTES) -> str:
    """One whole text: UTF-8, or what its byte-order mark says; plain, .xz, .gz or .bz2.

    Raises:
        InputError: as `open_packed`; not text.
    """
    with open_packed(path, most) as stream:
        data = stream.read()
    return text_of(data, str(path))


def text_of(data: bytes, origin: str) -> str:
    """`data` as text.

    Raises:
        InputError: bytes that are no UTF-8, or a NUL character, which no text holds.
    """
    text = decoded(data, origin)
    if "\0" in text:
        raise InputError(f"{origin} is no text: it holds a NUL character at {text.index(chr(0)):,}")
    return text


def tar_members(path: Path, suffixes: tuple[str, ...], most: int) -> Iterator[tuple[str, bytes]]:
    """Name and content of the files in a .tar, .tar.xz, .tar.gz or .tar.bz2, one after another.

    Raises:
        InputError: as `open_packed`, where `most` counts the whole archive.
    """
    with open_packed(path, most) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            file = archive.extractfile(member) if member.isreg() else None
            if file is not None and member.name.endswith(suffixes):
                yield member.name, file.read()


class _Counted(io.RawIOBase):
    """A stream that ends in an error after `most` bytes."""

    def __init__(self, stream: Any, path: Path, most: int) -> None:
        self.stream, self.path, self.left, self.most = stream, path, most, most

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        # Pieces, so that no more than a piece is unpacked beyond the limit.
        data = self.stream.read(min(len(buffer), _BLOCK))
        self.left -= len(data)
        if self.left < 0:
            raise InputError(f"{self.path} holds more than {self.most:,} bytes unpacked")
        buffer[: len(data)] = data
        return len(data)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
