"""The folder of real data, and reading one long document from it."""

from __future__ import annotations

import os
from pathlib import Path

import rwkvx.files as files
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
    folder = files.user_path(name)
    if not folder.is_dir():
        raise InputError(f"data folder {name!r} (from {origin}) is not a folder")
    return folder


def read_text(path: str | os.PathLike[str]) -> str:
    """One whole text file, plain or compressed; see `rwkvx.files.read_text`.

    Raises InputError as that does, and for an empty text.
    """
    text = files.read_text(files.user_path(path))
    if not text.strip():
        raise InputError(f"text file {str(path)!r} is empty")
    return text
