"""Writing safetensors files so that a reader never sees half of one."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from rwkvx.files import replacing, write_bytes, write_json

__all__ = ["replacing", "write_bytes", "write_json", "write_tensors"]


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
