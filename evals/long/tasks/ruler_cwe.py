"""RULER's common words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rwkvx_evals.long.haystack import EMPTY, Haystack, Table, longest
from rwkvx_evals.long.scores import match_all
from rwkvx_evals.long.sources import random_pair, words
from rwkvx_evals.long.task import Ids, Sample
from rwkvx_evals.long.writer import Layout, Writer

COMMON = 10
HEAD = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
TAIL = (
    "\nQuestion: What are the 10 most common words in the above list?\n\n"
    "Answer: The top 10 words that appear most often in the list are:"
)


# How often a common word and any other appear, in long and in short lists.
LONG, SHORT = (30, 3), (6, 1)


class CommonWords:
    """The ten words that a numbered list repeats more often than all others."""

    name = "ruler_cwe"
    about = "the 10 most common words of a numbered list; share of them named"
    source = (
        "RULER (arXiv 2404.06654), as in lm-eval (no worked example); lengths are exact, with "
        "room for answers written in bytes; lists too long for RULER's 8,000 words are made of "
        "adjective-noun pairs, all of them"
    )
    answer_tokens = 240
    stop: tuple[str, ...] = ()

    def sample(self, writer: Writer, length: int, index: int) -> Sample:
        room = writer.room(self, length, self.layout(EMPTY))
        rows = writer.keep((self.name, length), lambda: _Rows(writer, length, room))
        rng = writer.rng(self.name, length, index)
        order, seed = rng.permutation(len(rows.words)), int(rng.integers(2**62))
        if rows.tokens(order[: COMMON + 1])[-1] > room:
            raise writer.too_short(self, length, length - room + rows.tokens(order[:11])[-1])
        hay = longest(lambda budget: rows.shuffled(order, budget, seed), room)
        common = [rows.words[word] for word in order[:COMMON]]
        return writer.sample(self, length, index, self.layout(hay), common)

    def layout(self, hay: Haystack) -> Layout:
        return Layout(HEAD, hay, TAIL, units=len(hay))

    def score(self, answer: str, sample: Sample) -> float:
        return match_all(answer, sample.answers)


class _Rows:
    """Numbered lists of words, from tokens of the numbers and the words that are made once."""

    def __init__(self, writer: Writer, length: int, room: int) -> None:
        self.words: Sequence[str] = sorted({*words("noun"), *words("adjective"), *words("verb")})
        some = " ".join(f"{1000 + n}. {word}" for n, word in enumerate(self.words[::40]))
        each = len(writer.encode(some)) / len(self.words[::40])
        # As RULER has it from 4,096 tokens on, where the common words leave room for others.
        fits = length >= 4096 and room > 2 * COMMON * LONG[0] * each
        self._often, self._seldom = LONG if fits else SHORT
        # One in eight more than will fit, and more of the first, which have shorter numbers.
        self._entries = int(room / each * 1.125) + 400
        wanted = self._entries // self._seldom
        if wanted > len(self.words):
            rng = writer.rng("ruler_cwe pairs")
            self.words = list(dict.fromkeys(random_pair(rng) for _ in range(wanted)))
        texts = [f" {n}." for n in range(1, self._entries + 1)] + [f" {w}" for w in self.words]
        used = np.arange(max(self._entries, len(self.words)))
        mixed = [used % self._entries, self._entries + used % len(self.words)]
        # Words and small numbers are the same at every length.
        known: dict[str, Ids] = writer.keep("ruler_cwe tokens", dict)
        known |= {text: writer.encode(text) for text in texts if text not in known}
        self._table = Table(
            texts,
            lambda text: known[text] if text in known else writer.encode(text),
            np.stack(mixed, axis=1).reshape(-1),
        )

    def tokens(self, order: Ids) -> Ids:
        """Tokens of the lists of the first 1, 2, … words of an order, int64 [words]."""
        times = self._times(len(order))
        numbers = np.append(0, np.cumsum(self._table.sizes[: self._entries]))
        entries = np.minimum(np.cumsum(times), self._entries)
        return np.cumsum(self._table.sizes[self._entries + order] * times) + numbers[entries]

    def _times(self, count: int) -> Ids:
        return np.where(np.arange(count) < COMMON, self._often, self._seldom)

    def shuffled(self, order: Ids, budget: int, seed: int) -> Haystack:
        """The longest list of the first words of an order with at most `budget` tokens."""
        count = int(np.searchsorted(self.tokens(order), budget, side="right"))
        listed = np.repeat(order[:count], self._times(count))
        np.random.default_rng(seed).shuffle(listed)
        row = np.stack([np.arange(len(listed)), self._entries + listed], axis=1)
        return self._table.row("a list of words", row.reshape(-1), before=" ")


TASKS = [CommonWords()]
