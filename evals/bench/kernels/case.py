"""A kernel to measure: what it must compute, what it cannot avoid, who else can do it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One operation at one size.

    Attributes:
        family: rows of one family and many sizes make one line of the picture.
        tokens: length of the sequence, for the picture.
        bytes: what any implementation reads and writes at least. flops: multiplications and
            additions of its matrix products, for the rate that is reported.
        subjects: makes the tensors and gives what is timed, by name: "ours" and peers.
        errors: relative error of each subject against float64 at a size that allows it.
        tolerance: more than that of ours fails the benchmark before anything is timed.
    """

    family: str
    tokens: int
    bytes: float
    flops: float
    subjects: Callable[[], dict[str, Call]]
    errors: Callable[[], dict[str, float]]
    tolerance: float

    @property
    def name(self) -> str:
        return f"{self.family}, {self.tokens} tokens"
