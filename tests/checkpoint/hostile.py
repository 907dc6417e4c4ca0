"""Files that ask for more than they hold, or are no files at all; each as `name -> path`."""

import json
import lzma
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rwkvx
from rwkvx.checkpoint.checkpoint import Checkpoint
from rwkvx.checkpoint.formats import FORMATS

GIB = 1 << 30
SHAPE = rwkvx.ModelConfig.from_dict(
    {"vocab_size": 30, "width": 64, "pattern": ["rwkv7"] * 2, "ffn_mult": 1, "tokenizer": None}
    | dict.fromkeys(("decay_rank", "iclr_rank", "value_rank", "gate_rank"), 2)
)


def small() -> Checkpoint:
    return Checkpoint.of(rwkvx.init_weights(rwkvx.Model(SHAPE)))


def state_dict() -> dict[str, Tensor]:
    """As BlinkDL names them."""
    layout: Any = __import__("rwkvx.checkpoint.pth", fromlist=["BLINKDL"]).BLINKDL
    tensors: dict[str, Tensor] = layout.write(small())
    return tensors


# ------------------------------------------------------------------------------------------ .pth


def saved(value: Any, path: Path, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def rezipped(path: Path, change: Callable[[str, bytes], bytes], method: int = 0) -> Path:
    """The same archive with its parts changed."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in parts.items():
            archive.writestr(name, change(name, data))
    return path


def big_endian(folder: Path) -> Path:
    def change(name: str, data: bytes) -> bytes:
        return b"big" if name.endswith("byteorder") else data

    return rezipped(saved(state_dict(), folder / "big.pth"), change)


def pickle_of(folder: Path, data: bytes, method: int = 0) -> Path:
    def change(name: str, old: bytes) -> bytes:
        return data if name.endswith("data.pkl") else old

    return rezipped(saved(state_dict(), folder / "p.pth"), change, method)


def bomb(folder: Path) -> Path:
    """Half a megabyte that unpacks to half a gigabyte: as much as one likes."""
    path = folder / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("bomb/data.pkl", "w", force_zip64=True) as part:
            part.write(bytes(1 << 29))
        archive.writestr("bomb/version", "3")
    return path


def empty_lists(folder: Path) -> Path:
    return pickle_of(folder, b"\x80\x02(" + b"]" * 15_000_000 + b"l.")


def far_memo(folder: Path) -> Path:
    return pickle_of(folder, b"\x80\x02}r\xff\xff\xff\x7f.")


def long_string(folder: Path) -> Path:
    return pickle_of(folder, b"\x80\x02\x8d" + struct.pack("<Q", 1 << 40) + b"abc.")


def bytearray_of(folder: Path) -> Path:
    return pickle_of(folder, b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x02\x85R.")


def nested_tuples(folder: Path) -> Path:
    """A key that takes 2^64 steps to hash."""
    return pickle_of(folder, b"\x80\x02}(" + b"K\x01" + b"2\x86" * 64 + b"K\x01u.")


def strides_of_zero(folder: Path) -> Path:
    """Tensors of 7 KB that ask for 16 TB."""
    tensors = {n: x.flatten()[:1].expand(1 << 20, 1 << 20) for n, x in state_dict().items()}
    return saved(tensors, folder / "expanded.pth")


def one_storage(folder: Path) -> Path:
    """Thousands of tensors over the same numbers."""
    numbers = torch.zeros(1 << 20)
    tensors = {f"blocks.{i}.att.x": numbers for i in range(20_000)}
    return saved({**state_dict(), **tensors}, folder / "aliased.pth")


def overlapping_parts(folder: Path) -> Path:
    """An archive whose directory names the same bytes many times."""
    path = saved(state_dict(), folder / "overlap.pth")
    content = bytearray(path.read_bytes())
    at, first = content.index(b"PK\x01\x02"), None
    while content[at : at + 4] == b"PK\x01\x02":
        lengths = struct.unpack_from("<3H", content, at + 28)
        first = struct.unpack_from("<I", content, at + 42)[0] if first is None else first
        struct.pack_into("<I", content, at + 42, first)
        at += 46 + sum(lengths)
    path.write_bytes(bytes(content))
    return path


def wide_directory(folder: Path) -> Path:
    """An archive of a million empty parts."""
    path = folder / "wide.pth"
    entry = b"PK\x01\x02" + bytes(24) + struct.pack("<3H", 1, 0, 0) + bytes(12) + b"a"
    count, end = 1_000_000, b"PK\x05\x06" + bytes(4)
    directory = entry * count
    tail = struct.pack("<2H2IH", 65535, 65535, len(directory), 4, 0)
    path.write_bytes(b"PK\x03\x04" + directory + end + tail)
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def legacy_claims(folder: Path) -> Path:
    """Written by hand: the keys of storages that are not there."""
    head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    data = b"".join(pickle.dumps(x, protocol=2) for x in head)
    pid = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    pid += b"\x8a\x07\x00\x00\x00\x00\x00\x00\x10Nt"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + pid + b"QK\x00M\x00\x10\x85K\x01\x85\x89Nt"
    data += b"\x80\x02}X\x0a\x00\x00\x00emb.weight" + tensor + b"Rs."
    data += pickle.dumps(["0"], protocol=2) + struct.pack("<q", 1 << 50)
    return written(folder / "claims.pth", data)


# ---------------------------------------------------------------------------------- safetensors


def with_header(folder: Path, header: bytes, length: int | None = None, hole: int = 0) -> Path:
    """A folder of ours whose weights have this header, then a hole of so many bytes."""
    FORMATS["folder"].write(small(), folder)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header) if length is None else length) + header)
        file.truncate(file.tell() + hole)
    return folder


def long_header(folder: Path) -> Path:
    return with_header(folder, b"{" + b" " * 10, 1 << 62)


def header_of_holes(folder: Path) -> Path:
    return with_header(folder, b'{"a": ', 50 * GIB, 60 * GIB)


def deep_header(folder: Path) -> Path:
    return with_header(folder, b'{"a":' + b"[" * 1_000_000)


def header_of_lists(folder: Path) -> Path:
    """Of the largest size that is read at all."""
    return with_header(folder, b'{"a":[' + b"[]," * 1_200_000 + b"1]}")


def huge_shape(folder: Path) -> Path:
    shape = {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]}
    return with_header(folder, json.dumps({"emb.weight": shape}).encode(), hole=4)


def shape_of_zero(folder: Path) -> Path:
    shape = {"dtype": "F32", "shape": [0, 1 << 62, 1 << 62], "data_offsets": [0, 0]}
    return with_header(folder, json.dumps({"emb.weight": shape}).encode())


def many_names(folder: Path) -> Path:
    one = {"dtype": "U8", "shape": [], "data_offsets": [0, 1]}
    return with_header(folder, json.dumps({str(i): one for i in range(200_000)}).encode(), hole=1)


def overlapping_tensors(folder: Path) -> Path:
    """Every tensor over the same 64 MB."""
    size = 64 << 20
    one = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    return with_header(folder, json.dumps({str(i): one for i in range(1000)}).encode(), hole=size)


# ------------------------------------------------------------------------------ ggml and folders


def ggml_of_holes(folder: Path) -> Path:
    path = folder / "holes.bin"
    FORMATS["ggml"].write(small(), path)
    os.truncate(path, 200 * GIB)
    return path


def ggml_of_scalars(folder: Path) -> Path:
    head = struct.pack("<6i", 0x67676D66, 101, 30, 64, 2, 0)
    one = struct.pack("<4i", 1, 8, 0, 1)
    parts = (one + f"{i:08}".encode() + bytes(4) for i in range(100_000))
    return written(folder / "scalars.bin", head + b"".join(parts))


def in_folder(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        FORMATS["folder"].write(small(), folder)
        return written(folder / name, content).parent

    return make


def instead(name: str, make: Callable[[Path], object]) -> Callable[[Path], Path]:
    """A folder of ours with something that is no file in place of one."""

    def made(folder: Path) -> Path:
        FORMATS["folder"].write(small(), folder)
        (folder / name).unlink()
        make(folder / name)
        return folder

    return made


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def itself(make: Callable[[Path], object]) -> Callable[[Path], Path]:
    def made(folder: Path) -> Path:
        make(folder / "thing")
        return folder / "thing"

    return made


NO_FILES: dict[str, Callable[[Path], object]] = {
    "device": device, "loop": loop, "pipe": os.mkfifo, "folder": Path.mkdir,
}  # fmt: skip
INDEX = "model.safetensors.index.json"
HOSTILE: dict[str, Callable[[Path], Path]] = {
    "big-endian archive": big_endian,
    "bomb": bomb,
    "empty lists": empty_lists,
    "far memo": far_memo,
    "long string": long_string,
    "bytearray": bytearray_of,
    "nested tuples": nested_tuples,
    "strides of zero": strides_of_zero,
    "one storage": one_storage,
    "overlapping parts": overlapping_parts,
    "wide directory": wide_directory,
    "legacy claims": legacy_claims,
    "long header": long_header,
    "header of holes": header_of_holes,
    "deep header": deep_header,
    "header of lists": header_of_lists,
    "huge shape": huge_shape,
    "shape of zero": shape_of_zero,
    "many names": many_names,
    "overlapping tensors": overlapping_tensors,
    "ggml of holes": ggml_of_holes,
    "ggml of scalars": ggml_of_scalars,
    "deep config": in_folder("config.json", b"[" * 900_000),
    "long config": in_folder("config.json", b'{"a": "' + b"x" * 2_000_000 + b'"}'),
    "config of lists": in_folder("config.json", b'{"a":[' + b"[]," * 300_000 + b"1]}"),
    "wide model": in_folder(
        "config.json", json.dumps({**SHAPE.to_dict(), "width": 1 << 70}).encode()
    ),
    "deep model": in_folder(
        "config.json", json.dumps({**SHAPE.to_dict(), "pattern": ["rwkv7"] * 200_000}).encode()
    ),
    "deep index": in_folder(INDEX, b'{"weight_map":' + b"[" * 5_000_000),
    "index of names": in_folder(
        INDEX, json.dumps({"weight_map": {str(i): "a" for i in range(400_000)}}).encode()
    ),
    "sums": in_folder("SHA256SUMS", b"0  model.safetensors\n" * 2_000_000),
    **{f"{kind} as {name}": instead(name, make) for kind, make in NO_FILES.items()
       for name in ("config.json", "model.safetensors", "SHA256SUMS")},
    **{f"{kind} as model": itself(make) for kind, make in NO_FILES.items()},
    "xz": lambda folder: written(folder / "a.pth", lzma.compress(bytes(1 << 20))),
    "zeros": lambda folder: written(folder / "a.pth", bytes(1 << 20)),
    "empty": lambda folder: written(folder / "a.pth", b""),
}  # fmt: skip
