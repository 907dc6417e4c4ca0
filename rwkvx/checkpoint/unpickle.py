"""One pickle as data: its values with descriptions of tensors, and nothing else.

Of a pickle's operations only those that build plain values are known, and of the names in it only
those of torch's tensors. No object of the file's choosing is ever made, and nothing is called.
"""

import io
import pickletools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from rwkvx.checkpoint.stored import MOST_TENSORS
from rwkvx.errors import shown
from rwkvx.files import collector_paused

MOST_OPERATIONS = 500_000  # some thirty a tensor
_STORAGES = {
    "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Double": torch.float64, "Long": torch.int64, "Int": torch.int32, "Short": torch.int16,
    "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool, "Untyped": torch.uint8,
    "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128,
}  # fmt: skip
# What torch makes of a tensor that is not plain numbers; a model has none.
OTHER_TENSORS = {
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


class Unpickler:
    """Runs the operations of one pickle on plain values; see PEP 307 and `pickletools`."""

    def __init__(self, source: io.BytesIO) -> None:
        self.source, self.storages = source, dict[str, Storage]()
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """The value of the pickle; the source stands behind it then."""
        with collector_paused(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in strings of damaged files
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
    return Other(OTHER_TENSORS.get(last, f"a value of {function.name}"))


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
