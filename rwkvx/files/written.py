"""Writing files and folders so that a reader never sees half of one.

What is to be written goes to a temporary neighbour, is flushed to the disk and renamed. On any
error the neighbour is removed, and what was there before is as it was.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rwkvx.errors import WriteError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside the file `path`, of the same ending, that becomes it.

    Its mode is what the umask says, whoever writes it. A link stays, the file behind it is new.

    Raises:
        WriteError: the disk refuses.
    """
    target = Path(os.path.realpath(path))
    temporary = _neighbour(target, target.suffix)
    with _refused(path, temporary):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.touch(exist_ok=False)
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)
            flush(temporary)
            temporary.replace(target)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes it.

    Where `path` is a folder already, the files written take the place of their namesakes one by
    one, when all of them are complete.

    Raises:
        WriteError: the disk refuses.
    """
    target = Path(os.path.realpath(path))
    temporary = _neighbour(target, "")
    with _refused(path, temporary):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.mkdir()
            yield temporary
            if target.exists():
                for file in sorted(temporary.iterdir()):
                    file.replace(target / file.name)
            else:
                temporary.replace(target)
            flush(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file; raises WriteError."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8; a lone surrogate as its escape."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON, names in the order given."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def _refused(path: Path, temporary: Path) -> Iterator[None]:
    try:
        yield
    except WriteError as error:  # of a file in it, by the name that it was to have
        raise WriteError(str(error).replace(str(temporary), str(path))) from error
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror or error}") from error


def _neighbour(path: Path, suffix: str) -> Path:
    """A new name in the same folder, short enough for any file system."""
    return path.with_name(f".{uuid.uuid4().hex[:12]}.part{suffix[:16]}")


def flush(path: Path) -> None:
    """Until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
