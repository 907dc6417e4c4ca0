"""RULER's eight needles in a haystack."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rwkvx_evals.long.haystack import Haystack
from rwkvx_evals.long.scores import match_all
from rwkvx_evals.long.sources import random_pair
from rwkvx_evals.long.task import Sample
from rwkvx_evals.long.writer import Layout, Writer

# RULER's 40 depths in percent, evenly spaced and rounded.
DEPTHS = np.linspace(0, 100, num=40).round().astype(int)


def draw(kind: str, rng: np.random.Generator) -> str:
    """A random key or value: of seven digits, `adjective-noun`, or a version 4 UUID."""
    if kind == "numbers":
        return str(rng.integers(1_000_000, 10_000_000))
    if kind == "words":
        return random_pair(rng)
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def needle(values: str, key: str, value: str) -> str:
    """The sentence that is hidden."""
    return f"One of the special magic {values} for {key} is: {value}."


@dataclass(frozen=True)
class Niah:
    """haystack: "noise", "book" or "needles". keys, values: kinds of both, see `draw`.

    shown: keys that are hidden, asked: those that are asked for, each: values of every key.
    """

    name: str
    haystack: str
    keys: str = "words"
    values: str = "numbers"
    shown: int = 1
    asked: int = 1
    each: int = 1
    answer_tokens: int = 128
    stop: tuple[str, ...] = ()

    @property
    def about(self) -> str:
        place = {"noise": "noise", "book": "a book", "needles": "many others like it"}
        asked, hidden = self.asked * self.each, self.shown * self.each
        return (
            f"{asked} of {hidden} {self.values} hidden in {place[self.haystack]}, "
            f"told by {self.keys}; share of them found"
        )

    @property
    def source(self) -> str:
        text = {
            "noise": "RULER (arXiv 2404.06654), as in lm-eval",
            "book": "RULER (arXiv 2404.06654), as in lm-eval, in public-domain books, not essays",
            "needles": "RULER (arXiv 2404.06654), as in lm-eval; all samples share the distractors",
        }
        return f"{text[self.haystack]}; lengths are exact, keys are never equal"

    def sample(self, writer: Writer, length: int, index: int) -> Sample:
        rng = writer.rng(self.name, length, index)
        hay = self._haystack(writer)
        keys: list[str] = []
        while len(keys) < self.shown:
            key = draw(self.keys, rng)
            known = self.haystack == "needles" and hay.holds(f" for {key} is:", length)
            if key not in keys and not known:
                keys.append(key)
        values = [[draw(self.values, rng) for _ in range(self.each)] for _ in keys]
        depths = np.sort(rng.choice(DEPTHS, self.shown * self.each, replace=False)) / 100
        order = rng.permutation(len(depths))
        asked = rng.choice(self.shown, self.asked, replace=False)
        hidden = [(key, value) for key, own in zip(keys, values, strict=True) for value in own]
        needles = [(depth, *hidden[at]) for depth, at in zip(depths.tolist(), order, strict=True)]
        queries = [keys[at] for at in asked]
        answers = [value for at in asked for value in values[at]]
        found = [depth for depth, _, value in needles if value in answers]
        about = {"depth": found[0]} if len(found) == 1 else {"depths": found}
        return writer.sample(
            self, length, index, self.layout(hay, needles, queries), answers, **about
        )

    def layout(
        self, hay: Haystack, needles: Sequence[tuple[float, str, str]], queries: Sequence[str]
    ) -> Layout:
        """needles: (depth, key, value) in order of depth."""
        one = self.asked * self.each == 1
        kind = self.values[:-1] if one else self.values
        some, are, what = ("A", "is", "is") if one else ("Some", "are", "are all")
        query = ", and ".join([", ".join(queries[:-1]), queries[-1]] if queries[1:] else queries)
        end = f"the special magic {kind} for {query} mentioned in the provided text"
        return Layout(
            f"{some} special magic {kind} {are} hidden within the following text. Make sure to "
            f"memorize it. I will quiz you about the {kind} afterwards.\n",
            hay,
            f"{'' if hay.after else chr(10)}What {what} {end}? The{end[3:]} {are}",
            needles=[
                (depth, hay.before + needle(self.values, key, value) + hay.after)
                for depth, key, value in needles
            ],
        )

    def _haystack(self, writer: Writer) -> Haystack:
        if self.haystack == "noise":
            return writer.noise()
        if self.haystack == "book":
            return writer.books()
        kinds = (self.keys, self.values)
        return writer.haystack(
            f"needles of {self.keys} and {self.values}",
            lambda: _needles(*kinds, writer.rng("niah needles", *kinds)), after="\n",
        )  # fmt: skip

    def score(self, answer: str, sample: Sample) -> float:
        return match_all(answer, sample.answers)


def _needles(keys: str, values: str, rng: np.random.Generator) -> Iterator[str]:
    while True:
        yield needle(values, draw(keys, rng), draw(values, rng)) + "\n"


TASKS = [
    Niah("niah_single_1", "noise"),
    Niah("niah_single_2", "book"),
    Niah("niah_single_3", "book", values="uuids"),
    Niah("niah_multikey_1", "book", shown=4),
    Niah("niah_multikey_2", "needles"),
    Niah("niah_multikey_3", "needles", keys="uuids", values="uuids"),
    Niah("niah_multivalue", "book", each=4),
    Niah("niah_multiquery", "book", shown=4, asked=4),
]
