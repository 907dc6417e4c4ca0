"""Launch options as tables: how large tiles are, and how many warps and stages work on them.

A family has one table. A row says for which stage, architectures, dtypes and head sizes it holds;
the first row that fits is taken. `vary` puts a row in front of all others, to time it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from rwkvx_kernels.dispatch import UnsupportedError
from rwkvx_kernels.tools.triton_device import Device, device_kind, interpreted

# NVIDIA's architectures before this one have no bfloat16 and no asynchronous copies.
LEAST_CAPABILITY = 80
ANY_SIZE = 1 << 30


class Options(NamedTuple):
    """What a kernel is launched with.

    Attributes:
        rows: of a tile: queries, or pairs of a query and what it chose. columns: of a tile: keys,
            or candidates. warps, stages: as Triton names them.
    """

    rows: int
    columns: int
    warps: int = 4
    stages: int = 2

    @property
    def launch(self) -> dict[str, int]:
        """Arguments of every launch."""
        return {"num_warps": self.warps, "num_stages": self.stages}


class Row(NamedTuple):
    """One row of a table.

    Attributes:
        stage: name of the kernel. options: for what the other columns fit.
        architectures: names as in `name_of`; none: any.
        bytes: of an element, at most. size: of a head, at most (of a token, where there are none).
    """

    stage: str
    options: Options
    architectures: tuple[str, ...] = ()
    bytes: int = 4
    size: int = 128


_varied: list[Row] = []


def name_of(device: Device) -> str:
    """ "sm_90", "gfx942"."""
    return f"sm_{device.arch}" if device.backend == "cuda" else str(device.arch)


def lacks(device: torch.device) -> str:
    """What keeps a GPU from running any kernel: "" if nothing does."""
    kind = device_kind(device)
    if kind.backend == "cuda" and int(kind.arch) < LEAST_CAPABILITY:
        return f"needs compute capability {LEAST_CAPABILITY / 10} or more, not {name_of(kind)}"
    return ""


def options_for(
    table: Sequence[Row], stage: str, dtype: torch.dtype, size: int, device: torch.device
) -> Options:
    """Of a stage, for inputs of a dtype and heads of a size.

    Raises:
        UnsupportedError: no row fits.
    """
    name = name_of(device_kind(device))
    for row in (*reversed(_varied), *table):
        if (
            row.stage == stage
            and (not row.architectures or name in row.architectures)
            and dtype.itemsize <= row.bytes
            and size <= row.size
        ):
            return row.options
    raise UnsupportedError(f"no kernel for {stage} of {dtype}, heads of {size}, on {name}")


def missing(
    table: Sequence[Row], stages: Sequence[str], dtype: torch.dtype, size: int, device: torch.device
) -> str:
    """What keeps stages from running, as the rest of a sentence; "" if nothing does, or where there
    is no GPU to ask."""
    if not interpreted() and not torch.cuda.is_available():
        return ""
    try:
        for stage in stages:
            options_for(table, stage, dtype, size, device)
    except UnsupportedError as error:
        return f"has {error}"
    return lacks(device)


@contextmanager
def vary(stage: str, options: Options) -> Iterator[None]:
    """Launches of a stage take these options, whatever its table says."""
    _varied.append(Row(stage, options, bytes=8, size=ANY_SIZE))
    try:
        yield
    finally:
        _varied.pop()
