"""The folder of real data, and reading one long document from it."""

from __future__ import annotations

import lzma
import os
from pathlib import Path

from rwkvx.errors import InputError

DATA_VARIABLE = "RWKVX_DATA"


def data_folder(explicit: str | os.PathLike[str] | None) -> Path | None:
    """The data folder to use: `explicit` (`--data`), else the variable RWKVX_DATA, else None.

    Raises InputError when the folder that was named is not there.
    """
    if explicit is not None:
        name, origin = os.fspath(explicit), "--data"
    else:
        name, origin = os.environ.get(DATA_VARIABLE, ""), DATA_VARIABLE
    if not name:
        return None
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise InputError(f"data folder {name!r} (from {origin}) is not a folder")
    return folder


def read_text(path: str | os.PathLike[str]) -> str:
    """One whole UTF-8 text file, plain or compressed (`.xz`).

    Raises InputError for a missing file, a truncated archive, bytes that are not UTF-8, and an
    empty text.
    """
    file = Path(path).expanduser()
    try:
        raw = file.read_bytes()
        if file.suffix == ".xz":
            raw = lzma.decompress(raw)
    except (OSError, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read text file {str(path)!r}: {reason}") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"text file {str(path)!r} is not UTF-8: {error}") from error
    if not text.strip():
        raise InputError(f"text file {str(path)!r} is empty")
    return text
