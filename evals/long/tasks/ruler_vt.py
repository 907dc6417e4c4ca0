"""RULER's variable tracking."""

from __future__ import annotations

import string
from collections.abc import Sequence

import numpy as np

from rwkvx_evals.long.haystack import Haystack
from rwkvx_evals.long.scores import match_all
from rwkvx_evals.long.sources import NOISE
from rwkvx_evals.long.task import Sample
from rwkvx_evals.long.writer import Layout, Writer

HOPS = 4
EXAMPLE_LINES = 10  # of noise in the worked example
INTRODUCTION = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
)


def question(value: str) -> str:
    """What stands after the text, up to the answer ("assgined" is RULER's own)."""
    return (
        f"\nQuestion: Find all variables that are assigned the value {value} in the text above. "
        "Answer: According to the chain(s) of variable assignment in the text above, "
        f"{HOPS + 1} variables are assgined the value {value}, they are:"
    )


def names(rng: np.random.Generator, letters: int) -> list[str]:
    """Different names, one more than there are hops."""
    found: dict[str, None] = {}
    while len(found) <= HOPS:
        found["".join(rng.choice(list(string.ascii_uppercase), letters))] = None
    return list(found)


def chain(variables: Sequence[str], value: str) -> list[str]:
    """One assignment of the value, and one for each hop (with RULER's space at its end)."""
    hops = zip(variables[1:], variables, strict=False)
    return [f"VAR {variables[0]} = {value}", *(f"VAR {a} = VAR {b} " for a, b in hops)]


def example(variables: Sequence[str], value: str) -> str:
    """A worked example in a few lines of noise, answered."""
    texts = [f"{NOISE}\n"] * EXAMPLE_LINES
    for number, assignment in enumerate(chain(variables, value)):
        texts.insert(2 * number + number, assignment)
    text = f"{INTRODUCTION}{' '.join(texts)}{question(value)}  {' '.join(variables)}"
    return text + 4 * "\n"


class VariableTracking:
    """Names of all variables that got a value along a chain of assignments."""

    name = "ruler_vt"
    about = "5 variables that are assigned one value in a chain, in noise; share of them named"
    source = (
        "RULER (arXiv 2404.06654), as in lm-eval; lengths are exact, with room for answers "
        f"written in bytes; all samples share the worked example, of {EXAMPLE_LINES} lines"
    )
    answer_tokens = 40
    stop: tuple[str, ...] = ()

    def sample(self, writer: Writer, length: int, index: int) -> Sample:
        rng = writer.rng(self.name, length, index)
        shown = writer.rng(self.name, "example")
        variables, value = names(rng, 5), str(rng.integers(10_000, 99_999))
        depths = np.sort(rng.random(HOPS + 1)).round(4).tolist()
        layout = self.layout(
            writer.noise(before=" "),
            example(names(shown, 3), str(shown.integers(10_000, 99_999))),
            list(zip(depths, chain(variables, value), strict=True)),
            value,
        )
        return writer.sample(self, length, index, layout, variables, depths=depths)

    def layout(
        self, hay: Haystack, shown: str, chain: Sequence[tuple[float, str]], value: str
    ) -> Layout:
        """shown: the worked example. chain: (depth, assignment) in order of depth."""
        needles = [(depth, f" {assignment}") for depth, assignment in chain]
        return Layout(f"{shown}{INTRODUCTION}", hay, question(value), needles)

    def score(self, answer: str, sample: Sample) -> float:
        return match_all(answer, sample.answers)


TASKS = [VariableTracking()]
