"""Text files, plain or compressed, of which no more is unpacked than was asked for."""

import bz2
import codecs
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
_OPENERS: dict[str, Any] = {
    ".xz": lzma.LZMAFile,
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".bz2": bz2.BZ2File,
}
_BLOCK = 1 << 20
# Text shrinks to a quarter, and what repeats a line for ever to a hundredth: more is no text.
_MOST_UNPACKED, _UNPACKED_ANYWAY = 200, 16_000_000
_DAMAGE = (OSError, EOFError, lzma.LZMAError, zlib.error, tarfile.TarError, ValueError)


@contextmanager
def open_packed(path: Path, most: int) -> Iterator[io.BufferedReader]:
    """A regular file as a stream, unpacked if its name ends in .xz, .gz or .bz2.

    Raises:
        InputError: as `open_regular`; a damaged file; more than `most` bytes were read.
    """
    with open_regular(path) as file:
        opener = _OPENERS.get(path.suffix)
        stream = file if opener is None else opener(file)
        try:
            yield io.BufferedReader(_Counted(stream, path, most, file), _BLOCK)
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


def read_lines(path: Path, most: int = TEXT_BYTES) -> Iterator[str]:
    """The lines of a text as `read_text` reads it, one after another, without the whole of it.

    Raises:
        InputError: as `read_text`.
    """
    with open_packed(path, most) as stream:
        if stream.peek(4)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):  # no bytes to cut at
            yield from text_of(stream.read(), str(path)).split("\n")
            return
        for line in stream:
            yield text_of(line, str(path)).removesuffix("\n")


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
    """A stream that ends in an error after `most` bytes, or where it unpacks to far too much."""

    def __init__(self, stream: Any, path: Path, most: int, packed: IO[bytes]) -> None:
        self.stream, self.path, self.most, self.packed = stream, path, most, packed
        self.count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        # Pieces, so that no more than a piece is unpacked beyond the limit.
        data = self.stream.read(min(len(buffer), _BLOCK))
        self.count += len(data)
        if self.count > self.most:
            raise InputError(f"{self.path} holds more than {self.most:,} bytes of text")
        if self.count > max(_UNPACKED_ANYWAY, _MOST_UNPACKED * self.packed.tell()):
            raise InputError(
                f"{self.path} unpacks to over {_MOST_UNPACKED} times its size: no text"
            )
        buffer[: len(data)] = data
        return len(data)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
