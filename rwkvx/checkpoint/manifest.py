"""SHA-256 sums of a folder's files, in the format that `sha256sum -c` reads."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from rwkvx.errors import InputError, shown
from rwkvx.files import decoded, is_there, open_regular, read_bytes, write_text

MANIFEST = "SHA256SUMS"
_MOST_BYTES = 1_000_000


def write_manifest(folder: Path, names: Iterable[str]) -> None:
    """Write the sums of these files of the folder."""
    lines = [f"{_sum(folder / name)}  {name}\n" for name in sorted(names)]
    write_text(folder / MANIFEST, "".join(lines))


def verify_manifest(folder: Path) -> str:
    """Check every file that the manifest names; what was checked, in words.

    Raises:
        InputError: no manifest, a damaged one, or a file that is missing or has changed, by name.
    """
    path = folder / MANIFEST
    if not is_there(path):
        raise InputError(f"{folder} has no {MANIFEST} to verify it against")
    lines = decoded(read_bytes(path, _MOST_BYTES), path).splitlines()
    if len(set(lines)) < len(lines):
        raise InputError(f"{path} is damaged: it names a file twice")
    for line in lines:
        expected, space, name = line.partition("  ")
        if not space or not name or Path(name).name != name or "\0" in name:
            raise InputError(f"{path} is damaged: {shown(line)} is no sum and file name")
        if not is_there(folder / name):
            raise InputError(f"{folder / name} is missing, {MANIFEST} names it")
        if _sum(folder / name) != expected:
            raise InputError(
                f"{folder / name} is damaged or was changed: its SHA-256 is not that in {MANIFEST}"
            )
    listed = {line.partition("  ")[2] for line in lines}
    for weights in sorted(folder.glob("*.safetensors")):
        if weights.name not in listed:
            raise InputError(f"{path} does not name {weights.name}")
    return f"SHA-256 of {len(lines)} files"


def _sum(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
