"""RULER's frequent words."""

from __future__ import annotations

import math
import string
from bisect import bisect_right

import numpy as np

from rwkvx_evals.long.haystack import EMPTY, Haystack, Table, longest
from rwkvx_evals.long.scores import match_all
from rwkvx_evals.long.task import Ids, Sample
from rwkvx_evals.long.writer import Layout, Writer

LETTERS = 6
HEAD = (
    "Read the following coded text and track the frequency of each coded word. Find the three "
    "most frequently appeared coded words. "
)
TAIL = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
    "three most frequently appeared words in the above coded text? Answer: According to the "
    "coded text above, the three most frequently appeared words are:"
)


def counts(total: int, vocabulary: int) -> Ids:
    """How often each word appears, the most frequent first, int64 [vocabulary].

    RULER's zeta distribution: total · k^-2 / ζ(2) for the k-th word, rounded down.
    """
    ranks = np.arange(1, vocabulary + 1)
    return (total * ranks**-2.0 / (math.pi**2 / 6)).astype(np.int64)


class FrequentWords:
    """The three most frequent of invented words, whose frequency falls with the rank squared."""

    name = "ruler_fwe"
    about = "the 3 most frequent words of a coded text; share of them named"
    source = (
        "RULER (arXiv 2404.06654), as in lm-eval; lengths are exact and include the answer's room"
    )
    answer_tokens = 50
    stop: tuple[str, ...] = ()

    def sample(self, writer: Writer, length: int, index: int) -> Sample:
        rng = writer.rng(self.name, length, index)
        room = writer.room(self, length, self.layout(EMPTY))
        # No more words than tokens, so that those of a higher rank than this appear nowhere.
        ranks = min(length // 50, math.isqrt(room) + 4)
        coded = _invented(rng, ranks - 1)
        table = Table([" ...", *(f" {word}" for word in coded)], writer.encode)
        seed = int(rng.integers(2**62))

        def shuffled(budget: int) -> Haystack:
            sizes = table.sizes
            total = bisect_right(
                range(1, budget + 1), budget, key=lambda n: int(counts(n, ranks) @ sizes)
            )
            row = np.repeat(np.arange(ranks), counts(total, ranks))
            np.random.default_rng(seed).shuffle(row)
            return table.row("a coded text", row, before=" ")

        hay = longest(shuffled, room)
        return writer.sample(self, length, index, self.layout(hay), coded[:3])

    def layout(self, hay: Haystack) -> Layout:
        return Layout(HEAD, hay, TAIL, units=len(hay))

    def score(self, answer: str, sample: Sample) -> float:
        return match_all(answer, sample.answers)


def _invented(rng: np.random.Generator, count: int) -> list[str]:
    """Different words of six small letters."""
    found: dict[str, None] = {}
    while len(found) < count:
        letters = rng.choice(list(string.ascii_lowercase), (count, LETTERS))
        found |= dict.fromkeys("".join(row) for row in letters)
    return list(found)[:count]


TASKS = [FrequentWords()]
