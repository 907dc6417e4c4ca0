"""Loops compiled to machine code by Numba, where torch has no operation that does the work.

Importing this module imports Numba, which takes half a second: import it where it is used.
"""

import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import cache, wraps
from glob import escape
from hashlib import sha256
from pathlib import Path
from time import time
from typing import Any
from uuid import uuid4

import numba
import torch
from filelock import FileLock
from llvmlite import ir
from numba import carray, njit, types
from numba.core.caching import FunctionCache
from numba.core.compiler_lock import global_compiler_lock
from numba.core.serialize import dumps
from numba.extending import intrinsic

# Sums may be reordered and products contracted, so that loops become vector instructions; unlike
# full fast-math, infinities and NaN keep their meaning.
FAST = {"reassoc", "contract", "nsz"}
# A loop that another one calls, and is not inlined there, is found by its name among all that the
# process has compiled or loaded, optimised in one place or another: sums would round as whichever
# came first does, and a process that compiles would disagree with the next one, which loads.
COMMON: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "forceinline": True,
    "fastmath": FAST,
}
CACHE_LINE = 64
LEFT_SECONDS = 3600.0  # after which a file that was being written will never be done


def loop(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile at the first call, without Python's lock; kept on disk for the next process."""
    return _compile(function)


def order_free(function: Callable[..., Any]) -> Callable[..., Any]:
    """As `loop`, for numbers without a NaN among them: largest and smallest are vectorised."""
    return _compile(function, fastmath=FAST | {"nnan"})


def parallel_loop(function: Callable[..., Any]) -> Callable[..., Any]:
    """As `loop`, with `numba.prange` over threads: these start within microseconds."""
    # Numba starts its threads where it compiles a parallel loop. Code that calls one and is loaded
    # from the disk does not start them: without this, a segmentation fault. Where both use the same
    # OpenMP, starting them sets torch's number of threads to Numba's: sums of one process would
    # change their order with the first loop.
    threads = torch.get_num_threads()
    numba.get_num_threads()
    torch.set_num_threads(threads)
    return _compile(function, parallel=True)


def _compile(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    compiled: Any = njit(function, **(COMMON | options))
    with suppress(RuntimeError):  # neither beside the package nor in the home folder may one write
        compiled._cache = _Cache(function)
        compiled.compile = _by_turns(compiled.compile, compiled._cache.lock)
    return compiled


def _by_turns(compile_or_load: Callable[..., Any], lock: Path) -> Callable[..., Any]:
    """Of processes that need the same loop at once, one compiles it and the others load that.

    Compiled twice, it may round otherwise (sums are reordered): processes of one run would disagree
    with each other, and a run that goes on after a kill with what it was before.
    """

    @wraps(compile_or_load)
    def one_at_a_time(signature: Any) -> Any:
        # In this order: the thread that compiles a caller comes here for what it calls.
        with global_compiler_lock, ExitStack() as held:
            with suppress(OSError, NotImplementedError):  # a file system without locks
                lock.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(FileLock(lock))
            return compile_or_load(signature)

    return one_at_a_time


class _Cache(FunctionCache):
    """Numba's cache on disk, with files of our own; fresh while all sources are: Numba looks at the
    function's own file alone, but a loop holds code and constants that it uses from others."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        stamp = f"{numba.__version__} {_sources()}"
        files = _Files(Path(self._cache_path), self._impl.filename_base, stamp)
        self._cache_file, self.lock = files, files.lock  # type: ignore[assignment]


class _Files:
    """A function's machine code, a file for each signature: whole by its hash, or not there.

    Numba's own list of numbered files is written before them. After a kill in between, or by two
    processes at once, it can name the code of older sources, or that of another signature.
    """

    def __init__(self, folder: Path, base: str, stamp: str) -> None:
        self.folder, self.base = folder, base
        self.stamp = sha256(stamp.encode()).hexdigest()[:16]

    @property
    def lock(self) -> Path:
        """Held by the process that compiles the function or loads it."""
        return self.folder / f"{self.base}.{self.stamp}.lock"

    def _path(self, key: object) -> Path:
        name = sha256(repr(key).encode()).hexdigest()[:16]
        return self.folder / f"{self.base}.{self.stamp}.{name}.nbc"

    def flush(self) -> None:
        """Remove all of them."""
        for path in self.folder.glob(f"{escape(self.base)}.*"):
            path.unlink(missing_ok=True)

    def save(self, key: object, data: object) -> None:
        """Write one; without a place on the disk, the next process compiles again."""
        content = dumps((key, data))
        path = self._path(key)
        temporary = path.with_suffix(f".{uuid4().hex[:8]}.tmp")
        with suppress(OSError):
            self._clean()
            try:
                temporary.write_bytes(sha256(content).digest() + content)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)

    def load(self, key: object) -> Any:
        """What was saved for that signature, None if nothing whole was."""
        try:
            written = self._path(key).read_bytes()
        except OSError:
            return None
        content = written[32:]
        if sha256(content).digest() != written[:32]:
            return None
        saved, data = pickle.loads(content)  # as trusted as the .pyc beside it, like Numba's own
        return data if saved == key else None

    def _clean(self) -> None:
        """Remove what other sources and killed processes have left."""
        for path in self.folder.glob(f"{escape(self.base)}.*"):
            left = path.suffix == ".tmp" and time() - path.stat().st_mtime > LEFT_SECONDS
            if left or not path.name.startswith(f"{self.base}.{self.stamp}."):
                path.unlink(missing_ok=True)


@cache
def _sources() -> str:
    """Hash of all kernels but those in Triton."""
    sha = sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        if not file.name.startswith("triton_"):
            sha.update(file.read_bytes())
    return sha.hexdigest()


def in_threads(work: Callable[..., None], units: int, *args: Any) -> None:
    """Call `work(first, last, *args)` on equal parts of `units`, in as many threads as torch."""
    parts = max(1, min(torch.get_num_threads(), units))
    bounds = [units * i // parts for i in range(parts + 1)]
    waiting = [_pool().submit(work, bounds[i], bounds[i + 1], *args) for i in range(1, parts)]
    work(bounds[0], bounds[1], *args)
    for future in waiting:
        future.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="rwkvx")


@intrinsic
def _pointer(context, address, like):  # type: ignore[no-untyped-def]
    """An address as a pointer to elements of the type of the array `like`."""

    def make(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(address, like), make


@intrinsic
def _prefetch(context, address):  # type: ignore[no-untyped-def]
    """Ask for the cache line of an address, which may be any."""

    def make(context, builder, signature, args):  # type: ignore[no-untyped-def]
        number, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        ask = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        read, keep, data = number(0), number(3), number(1)
        builder.call(ask, [builder.inttoptr(args[0], pointer), read, keep, data])
        return context.get_dummy_value()

    return types.void(types.intp), make


@loop
def read_ahead(address, size):  # type: ignore[no-untyped-def]
    """Have `size` bytes brought to the caches while other work is done; any address will do."""
    for offset in range(0, size, CACHE_LINE):
        _prefetch(address + offset)  # type: ignore[call-arg]


# At an assignment between arrays, whose memory may overlap, Numba compiles for two seconds.
@loop
def copy_row(x, out):  # type: ignore[no-untyped-def]
    """out[:] = x, of one axis."""
    for i in range(len(out)):
        out[i] = x[i]


@loop
def copy_matrix(x, out):  # type: ignore[no-untyped-def]
    """out[:] = x, of two axes."""
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[i, j] = x[i, j]


@loop
def array_at(address, shape, like):  # type: ignore[no-untyped-def]
    """The array of that shape at an address, of the type of the array `like`."""
    return carray(_pointer(address, like), shape)  # type: ignore[call-arg]
