"""The formats that a model can come in, in the order in which they are asked.

A format is a module with the members of `Format`. To add one, write it and name it here.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from rwkvx.checkpoint import fla, folder, ggml, pth
from rwkvx.checkpoint.checkpoint import Checkpoint
from rwkvx.checkpoint.foreign import by_start
from rwkvx.checkpoint.stored import start_of
from rwkvx.errors import InputError


class Format(Protocol):
    """What a module must offer to be a format; InputError says what is wrong with a file."""

    TITLE: str
    SUFFIXES: tuple[str, ...]  # endings of a target that mean this format

    def matches(self, path: Path, /) -> bool:
        """Whether the content of an existing file or folder looks like this format."""

    def read(self, path: Path, overrides: Mapping[str, Any], meta: bool = False, /) -> Checkpoint:
        """The model, with fields of the config as a sidecar says, and overridden over that; `meta`:
        no weights, only shapes."""

    def write(self, checkpoint: Checkpoint, path: Path, /) -> str | None:
        """Write the model with the dtypes it has; what to tell of fields that a sidecar keeps."""

    def verify(self, path: Path, /) -> str:
        """Check what checksums there are; what was checked, in words."""


FORMATS: dict[str, Format] = {"fla": fla, "folder": folder, "pth": pth, "ggml": ggml}


def detect(path: Path) -> Format:
    """The format of a file or folder, by its content.

    Raises:
        InputError: none of them, in words that say what it is where that can be told.
    """
    for candidate in FORMATS.values():
        if candidate.matches(path):
            return candidate
    if words := by_start(start_of(path)):
        raise InputError(f"{path} is of no known format: it is {words}")
    titles = "; ".join(candidate.TITLE for candidate in FORMATS.values())
    raise InputError(f"{path} is of no known format ({titles}), or damaged at its beginning")


def format_of_target(target: Path, name: str | None = None) -> Format:
    """The format to write: the one of that name, else by the ending, else our own folder.

    Raises:
        InputError: an ending of files that are not written.
    """
    if name is not None:
        return FORMATS[name]
    for candidate in FORMATS.values():
        if target.suffix in candidate.SUFFIXES:
            return candidate
    if target.suffix in (".safetensors", ".pt", ".ckpt", ".gguf", ".st"):
        raise InputError(
            f"{target}: files of {target.suffix} are not written; name a folder, or a file of "
            ".pth or .bin"
        )
    return folder
