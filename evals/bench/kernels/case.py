"""A kernel or model to measure: what it must compute, what it cannot avoid, who else can do it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Call = Callable[[], object]
OURS = "ours"


@dataclass(frozen=True)
class Case:
    """One operation at one size.

    Attributes:
        family: rows of one family and many sizes make one line of the picture.
        tokens: length of the sequence, or of the context before decoded tokens.
        bytes: what any implementation reads and writes at least. flops: multiplications and
            additions of its matrix products.
        subjects: makes the tensors and gives what is timed, by name: `OURS` and peers.
        errors: by the same names, the relative error against float64 at a size that allows it.
        tolerance: with a larger error of ours nothing is timed and the benchmark fails.
        importance: cases of 1 come first, the largest last; those that no longer fit are left out.
        cost: about so many seconds on a GPU of a data centre, compilation included.
        units: tokens that one call reads; 0 for `tokens`.
        inputs_bytes, outputs_bytes: sizes of the tensors that go in and come out; where they are
            given, what a call allocates beyond its outputs is put in relation to both.
        energy: whether joules are measured, too.
    """

    family: str
    tokens: int
    bytes: float
    flops: float
    subjects: Callable[[], dict[str, Call]]
    errors: dict[str, Callable[[], float]]
    tolerance: float
    importance: int = 1
    cost: float = 1.0
    units: int = 0
    inputs_bytes: int = 0
    outputs_bytes: int = 0
    energy: bool = False

    @property
    def name(self) -> str:
        """For one line of text."""
        return f"{self.family}, {self.tokens:,} tokens"


# Lengths of a family with the importance of each.
Plan = dict[int, int]


def planned(plan: Plan, lengths: tuple[int, ...]) -> Plan:
    """The lengths asked for with their importance, or the whole plan where none are."""
    return {n: plan.get(n, 3) for n in lengths} if lengths else plan
