"""What the kernels are meant to reach, and whether the rows of a benchmark show it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from rwkvx_evals.bench.kernels import chunk_attention as chunk
from rwkvx_evals.bench.kernels import models, training, wkv7
from rwkvx_evals.bench.kernels.case import OURS
from rwkvx_evals.bench.kernels.dense import SDPA
from rwkvx_evals.bench.timing import spread

Row = dict[str, Any]
K = 1024


class Rows:
    """The measured rows of a benchmark, by family and length."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = {(r["family"], r["tokens"]): r for r in rows if r["status"] == "measured"}

    def seconds(self, family: str, tokens: int) -> list[float]:
        """Of ours, every repeat; KeyError where there is none."""
        found: list[float] = self[family, tokens]["seconds"][OURS]
        return found

    def __getitem__(self, key: tuple[str, int]) -> Row:
        return self._rows[key]


@dataclass(frozen=True)
class Target:
    """A figure to reach.

    Attributes:
        what: in words. wanted: the bound, a lower one where `more`.
        measure: the figure itself, its spread as `spread` names it; KeyError: not measured.
        unit: behind the numbers.
    """

    what: str
    wanted: float
    more: bool
    measure: Callable[[Rows], dict[str, float]]
    unit: str = ""

    def judge(self, rows: Rows) -> dict[str, Any]:
        """A line of the summary: what, wanted, measured (or None), reached (or None)."""
        line: dict[str, Any] = {"what": self.what, "wanted": self.words(), "unit": self.unit}
        try:
            found = self.measure(rows)
        except KeyError:
            return {**line, "measured": None, "reached": None}
        value = found["median"]
        reached = value >= self.wanted if self.more else value <= self.wanted
        return {**line, "measured": found, "reached": reached}

    def words(self) -> str:
        """The bound as text."""
        return f"{'≥' if self.more else '≤'} {self.wanted:g}{self.unit}"


def fastest(row: Row, start: str) -> str:
    """Of the peers whose name starts so; KeyError where none was measured."""
    times = {n: median(x) for n, x in row["seconds"].items() if n.startswith(start)}
    if not times:
        raise KeyError(start)
    return min(times, key=lambda name: times[name])


def _faster(family: str, tokens: int, peer: str, rows: Rows) -> dict[str, float]:
    """How many times as fast as the fastest peer of that name."""
    row = rows[family, tokens]
    found: dict[str, float] = row["faster_than"][fastest(row, peer)]
    return found


def _error(family: str, tokens: int, peer: str, rows: Rows) -> dict[str, float]:
    """Error over that of the fastest peer."""
    row = rows[family, tokens]
    return spread([row["errors"][OURS] / row["errors"][fastest(row, peer)]])


def _over_bytes(family: str, tokens: int, rows: Rows) -> dict[str, float]:
    floor = rows[family, tokens]["floor_seconds"]["bytes"]
    return spread([x / floor for x in rows.seconds(family, tokens)])


def _rate(family: str, tokens: int, rows: Rows) -> dict[str, float]:
    flops = rows[family, tokens]["flops"]
    return spread([1e-12 * flops / x for x in rows.seconds(family, tokens)])


def _share(family: str, tokens: int, rows: Rows) -> dict[str, float]:
    """Of the rate of one matrix product, in percent."""
    floor = rows[family, tokens]["floor_seconds"]["products"]
    return spread([100 * floor / x for x in rows.seconds(family, tokens)])


def _growth(family: str, above: int, below: int, per_token: bool, rows: Rows) -> dict[str, float]:
    """Time at one length over that at another, per token of the length or of what is decoded."""
    high, low = spread(rows.seconds(family, above)), spread(rows.seconds(family, below))
    scale = below / above if per_token else 1.0
    pairs = {"median": ("median", "median"), "min": ("min", "max"), "max": ("max", "min")}
    return {name: scale * high[a] / low[b] for name, (a, b) in pairs.items()}


def _memory(family: str, tokens: int, rows: Rows) -> dict[str, float]:
    value = rows[family, tokens]["over_inputs_and_outputs"]
    if value is None:
        raise KeyError(family)
    return spread([value])


def targets() -> list[Target]:
    """All of them, for one H200."""
    against = partial(partial, _faster)
    return [
        Target("WKV7 forward + backward, 16K tokens: times as fast as fla's chunk_rwkv7",
               1.3, True, against(wkv7.BOTH, 16 * K, wkv7.FLA)),
        Target("the same, 8 sequences of 4K tokens",
               1.3, True, against(wkv7.ROWS, 4 * K, wkv7.FLA)),
        Target("WKV7 forward, 64K tokens: times as fast as fla's chunk_rwkv7",
               1.5, True, against(wkv7.FORWARD, 64 * K, wkv7.FLA)),
        Target("WKV7 forward + backward, 16K tokens: error against float64 over fla's", 1.0, False,
               partial(_error, wkv7.BOTH, 16 * K, wkv7.FLA)),
        Target("WKV7 forward, 64K tokens: time over its byte floor", 3.0, False,
               partial(_over_bytes, wkv7.FORWARD, 64 * K)),
        Target("sparse attention forward with selection, 128K tokens: times as fast as dense SDPA",
               12.0, True, against(chunk.FORWARD, 128 * K, SDPA)),
        Target("sparse attention forward + backward, 128K tokens: times as fast as dense SDPA",
               10.0, True, against(chunk.BOTH, 128 * K, SDPA)),
        Target("sparse attention forward, 8K tokens: times as fast as dense SDPA",
               1.0, True, against(chunk.FORWARD, 8 * K, SDPA)),
        Target("sparse attention forward, 32K tokens: times as fast as dense SDPA",
               4.0, True, against(chunk.FORWARD, 32 * K, SDPA)),
        Target("sparse attention forward + backward, 8K tokens: times as fast as dense SDPA",
               1.0, True, against(chunk.BOTH, 8 * K, SDPA)),
        Target("sparse attention forward + backward, 32K tokens: times as fast as dense SDPA",
               3.0, True, against(chunk.BOTH, 32 * K, SDPA)),
        Target("sparse attention without selection, 128K tokens: effective matrix rate",
               200.0, True, partial(_rate, chunk.PART, 128 * K), " TFLOP/s"),
        Target("WKV7 forward: time per token at 1M over 64K", 1.15, False,
               partial(_growth, wkv7.FORWARD, 1024 * K, 64 * K, True)),
        Target("sparse attention forward, coarse to fine: time per token at 1M over 64K",
               1.15, False, partial(_growth, chunk.COARSE, 1024 * K, 64 * K, True)),
        Target("sparse attention forward, 512K tokens: peak extra memory over inputs and outputs",
               1.0, False, partial(_memory, chunk.FORWARD, 512 * K)),
        Target("sparse attention forward + backward, 512K tokens: peak extra memory over inputs "
               "and outputs", 1.0, False, partial(_memory, chunk.BOTH, 512 * K)),
        Target("training step of the 0.22B shape, 16K tokens: share of the products' rate",
               35.0, True, partial(_share, training.STEP, 16 * K), " %"),
        Target("decode step of the 0.22B shape, batch 1: time at 1M over 4K tokens of context",
               1.1, False, partial(_growth, models.DECODE, 1024 * K, 4 * K, False)),
    ]  # fmt: skip


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every target with what the rows show."""
    found = Rows(rows)
    return [target.judge(found) for target in targets()]
