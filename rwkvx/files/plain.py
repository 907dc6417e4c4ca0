"""Reading regular files: bytes, text of any Unicode encoding with a mark, JSON."""

import codecs
import gc
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rwkvx.errors import InputError, shown

JSON_BYTES = 4_000_000  # an index of 40,000 tensors; Python's objects take up to 25 times as much
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
# UTF-32's mark in little-endian order begins with UTF-16's.
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def user_path(name: str | os.PathLike[str]) -> Path:
    """A path as a user writes it: `~` is a home folder.

    Raises:
        InputError: an empty name, one with a NUL character, the home of nobody.
    """
    text = os.fspath(name)
    try:
        if not text or b"\0" in os.fsencode(text):
            raise InputError(f"{shown(text)} is no name of a file or folder")
        return Path(text).expanduser()
    except UnicodeEncodeError:
        raise InputError(f"{shown(text)} is no name of a file or folder") from None
    except RuntimeError:
        raise InputError(f"{shown(text)}: there is no such home folder") from None


def is_there(path: Path) -> bool:
    """Whether something has that name: also a link to nowhere, and what may not be looked at."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {_reason(error)}") from error
    return True


def open_regular(path: Path) -> IO[bytes]:
    """Open a regular file for reading; a pipe or device is neither waited for nor read.

    Raises:
        InputError: it is not there, cannot be read, or is not a regular file.
    """
    try:
        mode = os.stat(path).st_mode  # opening some devices does something already
        if stat.S_ISREG(mode):
            # Should it be a pipe by now: without a writer that would be waited for.
            file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
            mode = os.fstat(file.fileno()).st_mode
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {_reason(error)}") from error
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise InputError(f"cannot read {path}: it is {kind}, not a regular file")
    return file


def read_bytes(path: Path, most: int) -> bytes:
    """The whole file.

    Raises:
        InputError: as `open_regular`, or it has more than `most` bytes.
    """
    with open_regular(path) as file:
        try:
            # A file may grow, and those of /proc have no size.
            data = file.read(most + 1) if os.fstat(file.fileno()).st_size <= most else None
        except OSError as error:
            raise InputError(f"cannot read {path}: {_reason(error)}") from error
    if data is None or len(data) > most:
        raise InputError(f"{path} has more than {most:,} bytes: too large for what it should hold")
    return data


def decoded(data: bytes, origin: str | Path) -> str:
    """Text: UTF-8, or what the byte-order mark says, which is left out.

    Raises:
        InputError: it is not that.
    """
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise InputError(f"{origin} is damaged: it is not UTF-8 ({error.reason})") from error


def read_json(path: Path, most: int = JSON_BYTES) -> Any:
    """What a JSON file holds.

    Raises:
        InputError: as `read_bytes`, or it is damaged.
    """
    return parse_json(read_bytes(path, most), path)


def read_mapping(path: Path, most: int = JSON_BYTES) -> dict[str, Any]:
    """What a JSON file holds that is a mapping.

    Raises:
        InputError: as `read_json`, or it is something else.
    """
    data = read_json(path, most)
    if not isinstance(data, dict):
        raise InputError(f"{path} is damaged: it holds no mapping")
    return data


def parse_json(data: bytes | str, origin: str | Path) -> Any:
    """The value that JSON spells; a name that is given twice in one object is a mistake.

    Raises:
        InputError: damaged, or nested too deeply.
    """
    text = data if isinstance(data, str) else decoded(data, origin)
    try:
        with collector_paused():
            return json.loads(text, object_pairs_hook=_each_once)
    except RecursionError:
        raise InputError(f"{origin} is damaged: nested too deeply") from None
    except ValueError as error:
        raise InputError(f"{origin} is damaged: {error}") from error


@contextmanager
def collector_paused() -> Iterator[None]:
    """Without Python's collector of cycles, which takes ten times as long as reading values."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it names {shown(twice)} twice")
    return found


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
