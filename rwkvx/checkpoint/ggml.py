"""The ggml file of rwkv.cpp, pure RWKV-7 in float32 or float16.

A header of six int32 (magic, version, vocabulary, width, layers, type), then for each tensor three
int32 (number of dims, length of the name, type), the dims from the last to the first, the name
and the data (RWKV/rwkv.cpp, docs/FILE_FORMAT.md). Low-rank matrices are transposed with respect to
BlinkDL's, and the six mixes of a time mix are one tensor x_rwkvag [6, 1, C].
"""

import os
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from rwkvx.checkpoint.checkpoint import Checkpoint
from rwkvx.checkpoint.layout import Layout
from rwkvx.checkpoint.pth import BLINKDL, blinkdl_name
from rwkvx.checkpoint.sidecar import keep_lost, with_sidecar
from rwkvx.checkpoint.stored import MOST_TENSORS, Stored, read_stored, start_of
from rwkvx.errors import InputError
from rwkvx.files import open_regular, replacing

TITLE = "ggml file of rwkv.cpp"
SUFFIXES: tuple[str, ...] = (".bin",)
MAGIC, VERSION = 0x67676D66, 101
VERSIONS = (100, 101)  # they differ in quantised tensors only
DTYPES = {0: torch.float32, 1: torch.float16}
QUANTISED = {2: "Q4_0", 3: "Q4_1", 7: "Q5_0", 8: "Q5_1", 9: "Q8_0"}
_LONGEST = 256  # bytes of a name
_PACKED, _MIXES = "x_rwkvag", "rwkvag"

GGML = Layout(
    name="ggml",
    rename=blinkdl_name,
    deep=BLINKDL.deep,
    transposed=True,
    unused=BLINKDL.unused,
)
# rwkv.cpp finds tensors by name; this is the order in which its converter writes those of a block.
# fmt: off
_ORDER = (
    "ln1", "ln2", "ln0", "att.x_rwkvag",
    "att.w1", "att.w2", "att.w0", "att.a1", "att.a2", "att.a0", "att.v1", "att.v2", "att.v0",
    "att.g1", "att.g2", "att.k_k", "att.k_a", "att.r_k",
    "att.receptance", "att.key", "att.value", "att.output", "att.ln_x",
    "ffn.x_k", "ffn.key", "ffn.value",
)
# fmt: on


def matches(path: Path) -> bool:
    """Whether the file begins with the magic number."""
    return start_of(path)[:4] == struct.pack("<i", MAGIC)


def read(path: Path, overrides: Mapping[str, Any], meta: bool = False) -> Checkpoint:
    """Config and tensors; or, on the meta device, their shapes with the weights unread.

    Raises:
        InputError: a quantised, truncated or damaged file, or tensors that do not fit.
    """
    with open_regular(path) as file:
        _, version, vocab, width, layers, _ = _integers(file, 6, path)
        if version not in VERSIONS:
            raise InputError(f"{path} is of version {version}; known: {VERSIONS}")
        stored = _stored(file, path)
    raw = read_stored(path, stored, meta)
    raw = {name: x for key, packed in raw.items() for name, x in _unpack(key, packed)}
    checkpoint = GGML.read(raw, str(path), with_sidecar(path, overrides))
    config = checkpoint.config
    for what, told, found in (
        ("depth", layers, len(config.pattern)),
        ("vocabulary", vocab, config.vocab_size),
        ("width", width, config.width),
    ):
        if told != found:
            raise InputError(f"{path}: the {what} is {told} by its header, {found} by its tensors")
    return checkpoint


def write(checkpoint: Checkpoint, path: Path) -> str | None:
    """Write what rwkv.cpp reads: matrices in float32 or float16 as they are, the rest in float32.

    Raises:
        InputError: sparse blocks, or another dtype.
        WriteError: the disk refuses.
    """
    config = checkpoint.config
    GGML.check_place(config, "the file of rwkv.cpp")
    for name, x in checkpoint.tensors.items():
        if x.dtype not in DTYPES.values():
            kind = str(x.dtype).removeprefix("torch.")
            raise InputError(f"rwkv.cpp has no place for {kind} ({name}): add --dtype float32")
    raw = _pack(GGML.write(checkpoint))
    half = any(x.dtype == torch.float16 for x in raw.values())
    with replacing(path) as temporary, temporary.open("wb") as file:
        sizes = (config.vocab_size, config.width, len(config.pattern))
        file.write(struct.pack("<6i", MAGIC, VERSION, *sizes, int(half)))
        for name in sorted(raw, key=_place):
            x = raw[name]
            head = (x.dim(), len(name), int(x.dtype == torch.float16), *reversed(x.shape))
            file.write(struct.pack(f"<{len(head)}i", *head) + name.encode())
            file.write(x.numpy().tobytes())
    return keep_lost(checkpoint, path, TITLE, read)


def verify(path: Path) -> str:
    """Raise InputError: the format carries no checksums."""
    raise InputError(f"{path}: files of rwkv.cpp carry no checksums to verify")


def _stored(file: IO[bytes], path: Path) -> dict[str, Stored]:
    """Where the tensors lie that stand one after another to the end of the file."""
    stored: dict[str, Stored] = {}
    size = os.fstat(file.fileno()).st_size
    while (at := file.tell()) < size:
        dims, length, kind = _integers(file, 3, path)
        if not (0 < dims <= 4 and 0 < length <= _LONGEST) or len(stored) == MOST_TENSORS:
            raise InputError(f"{path} is damaged at byte {at}")
        shape = tuple(reversed(_integers(file, dims, path)))
        name = file.read(length).decode("ascii", "replace")
        if not re.fullmatch(r"[\w.]+", name, re.ASCII) or name in stored:
            raise InputError(f"{path} is damaged at byte {at}: {name!r} is no name, or comes twice")
        if kind in QUANTISED:
            raise InputError(
                f"{path}: {name} is quantised ({QUANTISED[kind]}): convert the file of FP32 or FP16"
            )
        if kind not in DTYPES or min(shape) < 1:
            raise InputError(f"{path} is damaged: {name} is of type {kind} and shape {shape}")
        stored[name] = Stored(DTYPES[kind], shape, file.tell(), size)
        if stored[name].start + stored[name].bytes > size:
            raise InputError(f"{path} is truncated in {name}")
        file.seek(stored[name].bytes, 1)
    return stored


def _integers(file: IO[bytes], count: int, path: Path) -> tuple[int, ...]:
    data = file.read(4 * count)
    if len(data) < 4 * count:
        raise InputError(f"{path} is truncated")
    return struct.unpack(f"<{count}i", data)


def _unpack(name: str, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The six mixes as tensors of their own, anything else as it is."""
    if name.endswith(_PACKED) and x.shape[0] == len(_MIXES):
        prefix = name.removesuffix(_PACKED)
        yield from ((f"{prefix}x_{mix}", row) for mix, row in zip(_MIXES, x.split(1), strict=True))
    else:
        yield name, x


def _pack(raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `_unpack`, and vectors in float32."""
    packed: dict[str, Tensor] = {}
    for name, x in raw.items():
        matrix = max(x.shape) < x.numel() and not name.endswith(".r_k")
        if m := re.fullmatch(rf"(.+\.att\.)x_[{_MIXES}]", name):
            rows = [raw[f"{m[1]}x_{mix}"] for mix in _MIXES]
            packed[m[1] + _PACKED] = torch.cat(rows).float()
        else:
            packed[name] = x if matrix else x.float()
    return packed


def _place(name: str) -> tuple[int, int, int]:
    """Where in the file a tensor stands."""
    if not (m := re.fullmatch(r"blocks\.(\d+)\.(.+?)(?:\.(weight|bias))?", name)):
        return ("emb.weight", "", "ln_out.weight", "ln_out.bias", "head.weight").index(name), 0, 0
    return 1, int(m[1]), 2 * _ORDER.index(m[2]) + (m[3] == "bias")
