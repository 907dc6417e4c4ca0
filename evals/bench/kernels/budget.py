"""The time that a benchmark may take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from rwkvx_evals.bench.kernels.case import Case


class Budget:
    """Seconds from now on."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._end = clock, clock() + seconds

    def left(self) -> float:
        """Seconds, negative when they are over."""
        return self._end - self._clock()

    def lacks(self, case: Case) -> str | None:
        """Why a case is left out; None where it fits."""
        if case.cost <= self.left():
            return None
        return f"takes about {case.cost:.0f} s, {max(0, self.left()):.0f} s were left"


def ordered(cases: Iterable[Case]) -> list[Case]:
    """By importance, otherwise as they came."""
    return sorted(cases, key=lambda case: case.importance)
