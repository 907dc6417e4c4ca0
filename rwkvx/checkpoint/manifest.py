"""SHA-256 sums of a folder's files, in the format that `sha256sum -c` reads."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from rwkvx.checkpoint.files import write_bytes
from rwkvx.errors import InputError

MANIFEST = "SHA256SUMS"


def write_manifest(folder: Path, names: Iterable[str]) -> None:
    """Write the sums of these files of the folder."""
    lines = [f"{_sum(folder / name)}  {name}\n" for name in sorted(names)]
    write_bytes(folder / MANIFEST, "".join(lines).encode())


def verify_manifest(folder: Path) -> str:
    """Check every file that the manifest names; what was checked, in words.

    Raises:
        InputError: no manifest, a damaged one, or a file that is missing or has changed, by name.
    """
    path = folder / MANIFEST
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(f"{folder} has no {MANIFEST} to verify it against") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is damaged: {error}") from error
    for line in lines:
        expected, space, name = line.partition("  ")
        if not space or not name or Path(name).name != name:
            raise InputError(f"{path} is damaged: {line[:80]!r} is no sum and file name")
        if not (folder / name).is_file():
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
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
