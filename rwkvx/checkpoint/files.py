"""Writing files so that a reader never sees half of one."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; what was written there is flushed to disk and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno is not None:  # written to a handle, or to the other name: say which file
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write to a temporary name beside `path`, flush to disk, rename."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, data: Any) -> None:
    """Write `data` as indented JSON."""
    write_bytes(path, (json.dumps(data, indent=2, sort_keys=True) + "\n").encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, from the tensors' own memory.

    Raises:
        OSError: the disk refuses; then there is no file, or the old one.
    """
    flat = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(flat, temporary, metadata={"format": "pt"})
        except SafetensorError as error:  # its words for an OSError
            raise OSError(f"cannot write {path}: {error}") from error
