"""Tensors of a `.pth` file as `torch.save` writes it, in an archive (since torch 1.6) or plain.

The pickle in it is read as data: of its operations only those that build plain values are known,
and of the names in it only those of torch's tensors, which become descriptions. No object of the
file's choosing is ever made, nothing is called, and memory is asked for when all is known.
"""

import io
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple
from zipfile import BadZipFile

import torch

from rwkvx.checkpoint.stored import MOST_TENSORS, Stored
from rwkvx.errors import InputError, shown
from rwkvx.files import collector_paused, open_regular

ZIP, PICKLE = b"PK\x03\x04", b"\x80"  # first bytes: as torch writes since 1.6, and before
PICKLE_BYTES = 16_000_000  # of names and shapes: 130 bytes a tensor
DIRECTORY_BYTES = 16_000_000
MOST_OPERATIONS = 500_000  # some thirty a tensor
_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
_STORAGES = {
    "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Double": torch.float64, "Long": torch.int64, "Int": torch.int32, "Short": torch.int16,
    "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool, "Untyped": torch.uint8,
    "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128,
}  # fmt: skip
# Where training frameworks put the weights of a checkpoint.
_PLACES = ("state_dict", "model_state_dict", "model", "module", "weights", "params", "net", "ema")
# What torch makes of a tensor that is not plain numbers; a model has none.
_OTHER_TENSORS = {
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_sparse_csr_tensor": "a sparse tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_qtensor": "a quantised tensor",
    "_rebuild_meta_tensor_no_storage": "a meta tensor, which has no numbers",
    "_rebuild_device_tensor_from_numpy": "a tensor of another device",
    "_rebuild_device_tensor_from_cpu_tensor": "a tensor of another device",
    "_rebuild_wrapper_subclass": "a wrapped tensor",
    "_rebuild_from_type_v2": "a tensor of a class of its own",
}
# Values that training leaves beside the weights; they become descriptions that nobody reads.
_HARMLESS = {
    "_codecs.encode", "builtins.bytearray", "builtins.complex", "builtins.set", "builtins.slice",
    "__builtin__.bytearray", "__builtin__.set", "collections.Counter", "collections.defaultdict",
    "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype",
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct", "numpy.ndarray",
    "torch.device", "torch.Generator", "torch.serialization._get_layout", "builtins.dict",
}  # fmt: skip


class Storage(NamedTuple):
    """Numbers of one kind in a row; `key` says where in the file."""

    dtype: torch.dtype
    key: str
    length: int


class Described(NamedTuple):
    """A tensor in a pickle: elements of a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class Other(NamedTuple):
    """Anything else that a pickle makes, by what it is in words."""

    words: str


class _Name(NamedTuple):
    """A class or function that a pickle names; it stays a name."""

    name: str


class CodeError(ValueError):
    """A pickle names what is no part of a tensor."""


class Pickled(NamedTuple):
    """What a `.pth` file holds: plain values with `Described` tensors, and where storages lie."""

    value: Any
    spans: dict[str, tuple[int, int]]

    def stored(self, x: Described) -> Stored:
        """Where a tensor lies in the file; ValueError where its storage is missing or too short."""
        if x.storage.key not in self.spans:
            raise ValueError(f"the numbers of storage {shown(x.storage.key)} are missing")
        start, size = self.spans[x.storage.key]
        if x.storage.length * x.storage.dtype.itemsize > size:
            raise ValueError(f"storage {shown(x.storage.key)} has {size:,} bytes, which is too few")
        first = start + x.offset * x.dtype.itemsize
        return Stored(x.dtype, x.shape, first, start + size, _unless_contiguous(x))


def read_pickled(path: Path) -> Pickled:
    """What a `.pth` file holds; no number of a tensor is read.

    Raises:
        InputError: code, a damaged or truncated file, another format.
    """
    with open_regular(path) as file:
        try:
            return _read_archive(file, path) if file.read(4) == ZIP else _read_plain(file)
        except InputError:
            raise
        except CodeError as error:
            raise InputError(
                f"{path} holds code ({error}), not only tensors; nothing of it was executed. Save "
                "the model's state_dict() alone"
            ) from error
        # Whatever the standard library's readers of archives and operations meet in a damaged file.
        except Exception as error:
            spoken = isinstance(error, ValueError | OSError | BadZipFile)
            reason = error if spoken else "it does not hold together"
            raise InputError(f"{path} is truncated or damaged: {reason}") from error


def stored_in_pickle(path: Path) -> dict[str, Stored]:
    """Where the tensors of a state dict lie in a `.pth` file; also of one inside a checkpoint.

    Raises:
        InputError: as `read_pickled`, or there are no tensors by name.
    """
    pickled = read_pickled(path)
    named = _state_dict(pickled.value)
    if not named:
        raise InputError(f"{path} does not hold tensors by name")
    stored = {}
    for name, x in named.items():
        if isinstance(x, Other):
            raise InputError(f"{path}: {shown(name)} is {x.words}, expected a plain one")
        try:
            stored[name] = pickled.stored(x)
        except ValueError as error:
            raise InputError(f"{path} is truncated or damaged: {error}") from error
    return stored


def archive_records(file: IO[bytes], path: Path) -> dict[str, tuple[int, int]]:
    """First byte and size by name of what an archive holds: as it is, one after the other.

    Raises:
        InputError: something is compressed, encrypted, overlaps or lies outside.
        zipfile.BadZipFile: and others, for a damaged directory.
    """
    size = os.fstat(file.fileno()).st_size
    records: dict[str, tuple[int, int]] = {}
    with zipfile.ZipFile(_Sparing(file)) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    free = 0
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise InputError(
                f"{path} is compressed inside, which torch.save never does: load it with torch and "
                "save it again"
            )
        file.seek(entry.header_offset)
        header = file.read(30)
        start = entry.header_offset + 30 + sum(struct.unpack("<2H", header[26:30]))
        if header[:4] != ZIP or start < free or start + entry.file_size > size:
            raise ValueError(f"its part {shown(entry.filename)} does not lie where it should")
        if entry.filename in records:
            raise ValueError(f"it holds {shown(entry.filename)} twice")
        records[entry.filename] = (start, entry.file_size)
        free = start + entry.file_size
    return records


def _state_dict(value: Any, depth: int = 3) -> dict[str, Any]:
    """Tensors by name: `value` itself, or the first of the usual places in it that has any."""
    if not isinstance(value, dict):
        return {}
    found = {n: x for n, x in value.items() if isinstance(n, str) and _is_tensor(x)}
    places = (value.get(name) for name in _PLACES if depth and not found)
    return found or next(filter(None, (_state_dict(x, depth - 1) for x in places)), {})


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Described) or (isinstance(x, Other) and x.words in _OTHER_TENSORS.values())


def _read_archive(file: IO[bytes], path: Path) -> Pickled:
    records = archive_records(file, path)
    roots = [name[: -len("data.pkl")] for name in records if name.endswith("data.pkl")]
    if any(name.endswith("/constants.pkl") for name in records):
        raise InputError(f"{path} is a TorchScript program: save the model's state_dict() instead")
    if len(roots) != 1:
        raise InputError(f"{path} is a zip archive, but none that torch.save has written")
    root = roots[0]
    order = _content(file, records.get(f"{root}byteorder", (0, 0)), 16)
    if order not in (b"", b"little"):
        raise InputError(f"{path} has the byte order {shown(order)}, this machine's is little")
    machine = _Machine(io.BytesIO(_content(file, records[f"{root}data.pkl"], PICKLE_BYTES)))
    prefix = f"{root}data/"
    spans = {n.removeprefix(prefix): span for n, span in records.items() if n.startswith(prefix)}
    return Pickled(machine.run(), spans)


def _read_plain(file: IO[bytes]) -> Pickled:
    """Pickles (magic number, version, system, the value, keys of storages), then the storages."""
    file.seek(0)
    head = io.BytesIO(file.read(PICKLE_BYTES))
    if _Machine(head).run() != _LEGACY_MAGIC or _Machine(head).run() != _LEGACY_VERSION:
        raise ValueError("it does not begin as torch.save begins a file")
    if _Machine(head).run()["little_endian"] is not True:
        raise ValueError("it was written on a big-endian machine")
    machine = _Machine(head)
    value, keys = machine.run(), _Machine(head).run()
    size, at, spans = os.fstat(file.fileno()).st_size, head.tell(), {}
    for key in keys:
        file.seek(at)
        (count,) = struct.unpack("<q", file.read(8))
        length = count * machine.storages[key].dtype.itemsize
        if not 0 <= length <= size - at - 8:
            raise ValueError(f"storage {shown(key)} reaches beyond the end of the file")
        spans[key] = (at + 8, length)
        at += 8 + length
    return Pickled(value, spans)


def _content(file: IO[bytes], span: tuple[int, int], most: int) -> bytes:
    start, size = span
    if size > most:
        raise ValueError(f"{size:,} bytes where there should be a few")
    file.seek(start)
    return file.read(size)


def _unless_contiguous(x: Described) -> tuple[int, ...] | None:
    expected = 1
    for size, stride in zip(reversed(x.shape), reversed(x.strides), strict=False):
        if size > 1 and stride != expected:
            return x.strides
        expected *= max(size, 1)
    return None if len(x.shape) == len(x.strides) else x.strides


class _Sparing(io.RawIOBase):
    """A file that refuses to be read by the hundred megabytes: a directory is a small part."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file

    def seekable(self) -> bool:
        return True

    def seek(self, *args: int) -> int:
        return self.file.seek(*args)

    def tell(self) -> int:
        return self.file.tell()

    def read(self, size: int = -1) -> bytes:
        if size > DIRECTORY_BYTES:
            raise ValueError("its directory is larger than that of any model")
        return self.file.read(size)


class _Machine:
    """Runs the operations of one pickle on plain values; see PEP 307 and `pickletools`."""

    def __init__(self, source: io.BytesIO) -> None:
        self.source, self.storages = source, dict[str, Storage]()
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """The value of the pickle; the source stands behind it then."""
        with collector_paused():
            return self._run()

    def _run(self) -> Any:
        argument: Any
        for count, (operation, argument, _) in enumerate(pickletools.genops(self.source)):
            if count > MOST_OPERATIONS:
                raise ValueError("its pickle is longer than that of any model")
            name = operation.name
            if name == "STOP":
                return self.stack.pop()
            if name in _PUSHES:
                self.stack.append(_PUSHES[name]())
            elif name in _LITERALS:
                self.stack.append(argument)
            elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
                self.memo[len(self.memo) if argument is None else argument] = self.stack[-1]
            elif name in ("BINGET", "LONG_BINGET", "GET"):
                self.stack.append(self.memo[argument])
            elif name == "GLOBAL":
                self.stack.append(_known(argument.replace(" ", ".", 1)))
            elif name not in ("PROTO", "FRAME"):
                getattr(self, f"do_{name.lower()}", self.unknown)()
        raise ValueError("its pickle has no end")

    def unknown(self) -> None:
        raise ValueError("its pickle does what tensors do not need")

    def from_mark(self) -> list[Any]:
        """The values above the last mark, which goes with them."""
        at = self.marks.pop()
        values = self.stack[at:]
        del self.stack[at:]
        return values

    def do_mark(self) -> None:
        self.marks.append(len(self.stack))

    def do_pop(self) -> None:
        self.stack.pop()

    def do_tuple(self) -> None:
        self.stack.append(tuple(self.from_mark()))

    def do_tuple1(self) -> None:
        self.stack[-1:] = [tuple(self.stack[-1:])]

    def do_tuple2(self) -> None:
        self.stack[-2:] = [tuple(self.stack[-2:])]

    def do_tuple3(self) -> None:
        self.stack[-3:] = [tuple(self.stack[-3:])]

    def do_append(self) -> None:
        value = self.stack.pop()
        _list(self.stack[-1]).append(value)

    def do_appends(self) -> None:
        values = self.from_mark()
        _list(self.stack[-1]).extend(values)

    do_additems = do_appends

    def do_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _set(self.stack[-1], [key, value])

    def do_setitems(self) -> None:
        values = self.from_mark()
        _set(self.stack[-1], values)

    def do_stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(_known(f"{module}.{name}"))

    def do_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.stack.append(_made(function, arguments))

    do_newobj = do_reduce

    def do_build(self) -> None:
        self.stack.pop()  # attributes, such as the versions that state_dict() notes

    def do_binpersid(self) -> None:
        kind, storage, key, _, count, *view = self.stack.pop()
        dtype = _STORAGES.get(storage.name.rpartition(".")[2].removesuffix("Storage"))
        if kind != "storage" or dtype is None or view not in ([], [None]) or type(count) is not int:
            raise ValueError("a storage that is none of torch's")
        found = Storage(dtype, str(key), count)
        self.stack.append(self.storages.setdefault(found.key, found))
        if self.stack[-1] != found or len(self.storages) > MOST_TENSORS:
            raise ValueError("storages that contradict one another")


_PUSHES: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_SET": list, "EMPTY_DICT": dict,
}  # fmt: skip
_LITERALS = {
    "BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "BINFLOAT", "FLOAT",
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BINSTRING", "SHORT_BINSTRING",
    "STRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip


def _list(x: Any) -> list[Any]:
    if not isinstance(x, list | Other):
        raise ValueError("it appends to what is no list")
    return [] if isinstance(x, Other) else x


def _set(x: Any, pairs: list[Any]) -> None:
    """Put key, value, key, value... into a mapping; keys are plain: others take ages to hash."""
    if isinstance(x, Other):
        return
    if not isinstance(x, dict) or len(pairs) % 2:
        raise ValueError("it fills what is no mapping")
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        if not isinstance(key, str | int | float | bytes | type(None)):
            raise ValueError("a mapping with keys that are no names")
        x[key] = value


def _known(name: str) -> _Name | torch.dtype:
    """A name that a tensor is made of; CodeError for any other."""
    module, _, last = name.rpartition(".")
    if module == "torch" and isinstance(dtype := getattr(torch, last, None), torch.dtype):
        return dtype
    storage = module in ("torch", "torch.cuda", "torch.storage") and last.endswith("Storage")
    rebuild = module in ("torch._utils", "torch._tensor") and last.startswith("_rebuild_")
    if storage or rebuild or name in _HARMLESS or name in ("collections.OrderedDict", "torch.Size"):
        return _Name(name)
    raise CodeError(shown(name).strip("'\""))


def _made(function: Any, arguments: Any) -> Any:
    """What torch's own functions make, as data."""
    if not isinstance(function, _Name) or not isinstance(arguments, tuple):
        raise ValueError("it calls what is no function")
    last = function.name.rpartition(".")[2]
    if function.name == "collections.OrderedDict":
        mapping: dict[Any, Any] = {}
        _set(mapping, [part for pair in (arguments or ((),))[0] for part in pair])
        return mapping
    if function.name == "torch.Size":
        return tuple(*arguments)
    if last in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
        return arguments[0]
    if last in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"):
        storage, offset, shape, strides, *more = arguments
        dtype = more[2] if last == "_rebuild_tensor_v3" else storage.dtype
        return _described(storage, offset, shape, strides, dtype)
    return Other(_OTHER_TENSORS.get(last, f"a value of {function.name}"))


def _described(
    storage: Any, offset: Any, shape: Any, strides: Any, dtype: torch.dtype
) -> Described:
    numbers = (offset, *shape, *strides)
    if (
        not isinstance(storage, Storage)
        or not isinstance(dtype, torch.dtype)
        or not all(type(n) is int and n >= 0 for n in numbers)
    ):
        raise ValueError("a tensor that is none")
    return Described(storage, offset, tuple(shape), tuple(strides), dtype)
