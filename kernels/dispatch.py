"""Choosing an implementation, the same way for every kernel family.

Every family's `api.choose` says what each implementation lacks for some `Facts`, and `decide`
picks. Nothing here looks at the values of a tensor but `check_cu_seqlens`.
"""

import os
from collections.abc import Callable, Mapping
from functools import lru_cache, wraps
from importlib.util import find_spec
from itertools import pairwise
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from rwkvx_kernels.names import IMPLEMENTATIONS

P = ParamSpec("P")
R = TypeVar("R")

HAS_TRITON = find_spec("triton") is not None
# Triton's interpreter: slow, for tests; it runs kernels on tensors of any device.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class UnsupportedError(NotImplementedError, ValueError):
    """What was asked of an implementation by its name it cannot do; says which one can."""


class Choice(NamedTuple):
    """Which implementation runs, and why, in plain English."""

    impl: str
    why: str


class Facts(NamedTuple):
    """What every choice depends on.

    Attributes:
        dtype: of the tensors that are multiplied. gradients: whether some are wanted.
        traced: whether `torch.compile` is tracing. autocast: whether `torch.autocast` is on there.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    gradients: bool = False
    traced: bool = False
    autocast: bool = False


def facts_of(first: Tensor, *others: Tensor | None) -> Facts:
    """Of a call with these tensors; device and dtype are those of the first."""
    gradients = torch.is_grad_enabled() and (
        first.requires_grad or any(x is not None and x.requires_grad for x in others)
    )
    autocast = torch.is_autocast_enabled(first.device.type)
    return Facts(first.device, first.dtype, gradients, torch.compiler.is_compiling(), autocast)


def on_gpu(device: torch.device) -> bool:
    """Whether "auto" takes Triton kernels there."""
    return device.type == "cuda"


def triton_lacks(facts: Facts) -> str:
    """What keeps any Triton kernel from running: "" if nothing does."""
    if not on_gpu(facts.device) and not INTERPRETED:
        return f"needs tensors on a GPU (or TRITON_INTERPRET=1), not on {facts.device.type}"
    if not HAS_TRITON:
        return 'needs the package triton (pip install "rwkvx[gpu]")'
    return "has no float64" if facts.dtype == torch.float64 else ""


def compiled_lacks(facts: Facts, *dtypes: torch.dtype) -> str:
    """What keeps a compiled loop for these dtypes (none given: any) from running."""
    if facts.device.type != "cpu":
        return "needs tensors on a CPU"
    if facts.gradients:
        return "has no gradients"
    return f"has no {facts.dtype}" if dtypes and facts.dtype not in dtypes else ""


def decide(
    impl: str, facts: Facts, lacks: Mapping[str, str], slower: Mapping[str, str] | None = None
) -> Choice:
    """The implementation that `impl` stands for.

    Args:
        impl: "auto" or one of `IMPLEMENTATIONS`. An explicit request is never replaced by another.
        lacks: for each implementation of the family, the fastest first, what it lacks of what is
            wanted, as the rest of a sentence that its name begins; "" if nothing.
        slower: for some of them, why "auto" passes them over here.

    Raises:
        ValueError: an unknown name. UnsupportedError: an implementation that lacks something.
    """
    if impl == "auto":
        gpu, where = on_gpu(facts.device), facts.device.type
        why = f"on a {'GPU' if gpu else where.upper()}, "
        why += "gradients wanted" if facts.gradients else "no gradient wanted"
        for name, missing in lacks.items():
            missing = missing or (slower or {}).get(name, "")
            if name == ("compiled" if gpu else "triton"):  # not for this kind of device
                continue
            if not missing:
                break
            why += f"; {name} {missing}"
        return Choice(name, why)
    if impl not in IMPLEMENTATIONS:
        known = ", ".join(("auto", *IMPLEMENTATIONS))
        raise ValueError(f"unknown impl {impl!r}: choose one of {known}")
    missing = lacks.get(impl, "is not there for this operation")
    if missing:
        others = ", ".join(f'"{name}"' for name in ("auto", *(x for x in lacks if not lacks[x])))
        raise UnsupportedError(f'impl="{impl}" {missing}: choose one of {others}')
    return Choice(impl, "asked for")


def decide_elementwise(impl: str, facts: Facts, triton: str) -> Choice:
    """As `decide`, for operations between products, of which there are all implementations.

    triton: what Triton lacks. Traced by `torch.compile`, "compiled" is torch's form: that is joined
    with its neighbours, where a compiled loop would stand apart.
    """
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    compiled = compiled_lacks(facts._replace(gradients=False), *dtypes)
    lacks = {"triton": triton, "compiled": compiled, "torch": "", "reference": ""}
    choice = decide(impl, facts, lacks)
    if facts.traced and choice.impl == "compiled":
        return Choice("torch", "torch.compile joins it with its neighbours")
    return choice


def remembered(
    choose: Callable[Concatenate[Facts, P], Choice],
) -> Callable[Concatenate[Facts, P], Choice]:
    """A family's `choose`, which depends on its arguments alone: made once for the same ones."""

    @lru_cache(maxsize=4096)
    def once(machine: object, facts: Facts, *args: P.args, **kwargs: P.kwargs) -> Choice:
        return choose(facts, *args, **kwargs)

    @wraps(choose)
    def look_up(facts: Facts, *args: P.args, **kwargs: P.kwargs) -> Choice:
        if facts.traced:  # by `torch.compile`, which would trace the table
            return choose(facts, *args, **kwargs)
        return once((on_gpu, HAS_TRITON, INTERPRETED), facts, *args, **kwargs)  # type: ignore[arg-type]

    return look_up


def check_cu_seqlens(cu_seqlens: Tensor, batch: int, tokens: int) -> list[int]:
    """Validate packed-sequence offsets and return them as a list.

    Args:
        cu_seqlens: [sequences + 1], integer, starts at 0, never decreases, ends at `tokens`.
        batch: batch size of the packed tensors, which must be 1.
        tokens: packed length T.

    Raises:
        ValueError: offsets that do not describe `tokens` packed tokens.
    """
    check_packed(cu_seqlens, batch)
    # A CPU is not waited for, and a tensor of inference mode does not say when it changes.
    here = cu_seqlens.device.type == "cpu" or cu_seqlens.is_inference()
    offsets = cu_seqlens.tolist() if here else read_once(cu_seqlens)
    if offsets[0] != 0 or offsets[-1] != tokens or offsets != sorted(offsets):
        raise ValueError(f"cu_seqlens must rise from 0 to T = {tokens}, got {offsets[:8]}")
    return offsets


class Run(NamedTuple):
    """Neighbouring packed sequences of one length: tokens `start` to `stop`."""

    start: int
    stop: int
    sequences: int

    def rows(self, x: Tensor) -> Tensor:
        """Packed [1, T, ...] -> a row for each sequence, [sequences, length, ...]: a view."""
        return x[0, self.start : self.stop].unflatten(0, (self.sequences, -1))


def runs_of(cu_seqlens: Tensor, batch: int, tokens: int) -> list[Run]:
    """The packed sequences that are not empty, those together that can be a batch of their own.

    Arguments and errors as for `check_cu_seqlens`.
    """
    runs: list[Run] = []
    for a, b in pairwise(check_cu_seqlens(cu_seqlens, batch, tokens)):
        last = runs[-1] if runs else Run(0, 0, 0)
        if last.sequences and last.stop - last.start == last.sequences * (b - a):
            runs[-1] = Run(last.start, b, last.sequences + 1)
        elif a < b:
            runs.append(Run(a, b, 1))
    return runs


_READ = WeakTensorKeyDictionary()  # of tensors that are alive: their version, their numbers


def send(x: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the CPU on a device. Nobody waits: a GPU copies from pinned memory by itself."""
    if torch.device(device).type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def send_numbers(x: Tensor, device: torch.device | str) -> Tensor:
    """As `send`, whole numbers [N], which `read_once` then knows without a look at the device."""
    sent = send(x, device)
    if torch.compiler.is_compiling():
        return sent
    if sent is not x and x.device.type == "cpu" and not sent.is_inference():
        _READ[sent] = (sent._version, x.tolist())
    return sent


def read_once(x: Tensor) -> list[int]:
    """The numbers of a tensor [N]: every layer asks for the same offsets, and a GPU is waited for
    once. They are read again after a change in place."""
    version, values = _READ.get(x, (None, []))
    if version != x._version:
        values = x.tolist()
        _READ[x] = (x._version, values)
    return values


def check_packed(cu_seqlens: Tensor, batch: int) -> int:
    """Validate what can be seen of packed-sequence offsets without a look at them.

    Returns:
        the number of sequences.

    Raises:
        ValueError: no 1-D tensor of integers; a batch size other than 1.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point() or len(cu_seqlens) < 1:
        raise ValueError("cu_seqlens must be a 1-D integer tensor of sequence offsets")
    if batch != 1:
        raise ValueError(f"packed sequences need batch size 1, got {batch}")
    return len(cu_seqlens) - 1


def autocast_dtype(x: Tensor) -> torch.dtype:
    """What a product would read `x` as: under `torch.autocast` the narrower dtype."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def without_autocast(operation: Callable[P, R]) -> Callable[P, R]:
    """Run an operation in the dtypes it chose itself, also inside `torch.autocast`."""

    @wraps(operation)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        device = next((x.device.type for x in tensors), "cpu")
        with torch.autocast(device, enabled=False):
            return operation(*args, **kwargs)

    return run
