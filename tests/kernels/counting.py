"""What a call of launchers would do on a GPU, counted on tensors of the "meta" device."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from rwkvx_kernels.tools.triton_device import SM_90, pretend


class Counts(TorchDispatchMode):
    """Launches and memory.

    Attributes:
        kernels: names of what was launched, Triton's and torch's, in order. grids: Triton's.
        peak: bytes of the tensors made inside that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[str] = []
        self.grids: list[tuple[int, ...]] = []
        self.peak = self._alive = 0
        self._tensors: dict[int, int] = {}  # alive, of each storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func)
        returns = func._schema.returns
        view = bool(returns) and returns[0].alias_info is not None
        view = view and not returns[0].alias_info.is_write
        if not view and "empty" not in name:
            self.kernels.append(name)
        given = {x.untyped_storage()._cdata for x in tree_leaves(args) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._follow(x, given)
        return out

    def _follow(self, x: Tensor, given: set[int]) -> None:
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._tensors:
            if key in given:  # a view of what was there before
                return
            self._alive += size
            self.peak = max(self.peak, self._alive)
        self._tensors[key] = self._tensors.get(key, 0) + 1
        weakref.finalize(x, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._tensors[key] -= 1
        if not self._tensors[key]:
            del self._tensors[key]
            self._alive -= size


@contextmanager
def counted() -> Iterator[Counts]:
    """Triton kernels are counted instead of launched, as on an sm_90."""
    counts = Counts()

    def run(kernel: Any, *_: Any, grid: tuple[int, ...], **__: Any) -> None:
        counts.kernels.append(kernel.fn.__name__)
        counts.grids.append(grid)

    with (
        pretend(SM_90),
        patch.object(JITFunction, "run", run),
        patch.object(InterpretedFunction, "run", run),
        counts,
    ):
        yield counts
