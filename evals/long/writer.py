"""Prompts of exact token lengths, for any tokenizer.

    head | units of a haystack … needle … units … | filler | tail

The haystack is tokenised once (haystack.py). What is put into it is tokenised together with the
unit before and the unit after, and the filler together with the last unit and the tail, so that
the tokens are those of the whole text. A few short words make the count exact.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from rwkvx.errors import InputError
from rwkvx.tokenizers.base import ExactTokenizer
from rwkvx_evals.long.haystack import Haystack
from rwkvx_evals.long.sources import NOISE, books, sentences
from rwkvx_evals.long.task import Ids, Sample, Task

Made = TypeVar("Made")

# What a question or an answer may be written with.
_NEEDED = "".join(chr(c) for c in range(33, 127))
# Texts to tokenise a piece behind, for tokenizers that treat the start of a text in their own way.
_LEADS = ("\n", ".", "x")
_PROBES = ("The grass is green.", " The sky is blue.", "\nHere we go.")
_SHORT = ("", ".", "!", " a", " I", " so", " on", "...", " too", " and", " then", "-")
_ENDINGS = sorted(
    {"".join(pair) for pair in product(_SHORT, repeat=2)}, key=lambda ending: (len(ending), ending)
)
_LONGEST_ENDING = len(_ENDINGS[-1])  # in characters, so in tokens too
_WORDS = (
    "well", "now", "then", "so", "yes", "oh", "why", "but", "or", "if", "as", "at", "by", "my",
    "up", "we", "us", "he", "me", "it", "no", "go", "do", "to", "be",
)  # fmt: skip
_VARYING = 32  # tokens by which the questions of one task may differ in length, and a short filler
_TRIES = 8  # units to leave out, one after another, before giving up on an exact count


class Encoder(Protocol):
    """The part of a tokenizer that prompts need."""

    def encode(self, text: str, /, *, add_special_tokens: bool = ...) -> list[int]: ...

    def decode(self, ids: list[int], /) -> str: ...


@dataclass(frozen=True)
class Layout:
    """What a prompt is made of.

    Attributes:
        head, tail: before and after the haystack. The first unit of the haystack loses its
            separator after the head, and after a needle that ends with a line break.
        needles: (depth, text) in order of depth; a depth is 0 … 1 of the haystack's tokens.
        close: stands right after the haystack, such as a bracket.
        filler: what stands before and after the short words that make the count exact; by default
            what stands before and after every unit of the haystack.
        units: how many units of the haystack, from its first; by default as many as fit.
    """

    head: str
    haystack: Haystack
    tail: str
    needles: Sequence[tuple[float, str]] = ()
    close: str = ""
    filler: tuple[str, str] | None = None
    units: int | None = None


class Writer:
    """Makes samples with one tokenizer, one seed and one source of texts.

    Attributes:
        seed: decides, with a task's name, a length and an index, all of a sample.
        data: the data folder; book: a text file to use in place of its books.
        begin: ids that the tokenizer itself puts in front of every text, int64 [B].
    """

    def __init__(
        self,
        tokenizer: Encoder,
        *,
        seed: int = 0,
        data: Path | None = None,
        book: Path | None = None,
    ) -> None:
        """Raises InputError for a tokenizer that cannot write ASCII."""
        self._tokenizer = tokenizer
        self._plain: Callable[[str], list[int]]
        self._plain = partial(tokenizer.encode, add_special_tokens=False)
        if isinstance(tokenizer, ExactTokenizer) and tokenizer.split_special_tokens:
            # What Hugging Face does around a text of a few words takes longer than its ids.
            self._plain = tokenizer.encode_text
        self.seed, self.data, self.book = seed, data, book
        self._kept: dict[Hashable, Any] = {}
        self._encode = lru_cache(256)(self._encode_text)
        ids = self._ids(_NEEDED)
        written = tokenizer.decode(ids.tolist()).lower()
        missing = "".join(c for c in _NEEDED.lower() if c not in written)
        if missing:
            raise InputError(f"the tokenizer cannot write {missing[:40]!r}, which prompts need")
        leads = _LEADS if self._marks_start() else ("",)
        self._leads = [(lead, self._ids(lead)) for lead in leads]
        plain, marked = self._ids(NOISE), tokenizer.encode(NOISE, add_special_tokens=True)
        places = range(len(marked) - len(plain) + 1)
        found = [n for n in places if marked[n : n + len(plain)] == plain.tolist()]
        self.begin: Ids = np.array(marked[: found[0]] if found else [], dtype=np.int64)

    # ------------------------------------------------------------- tokens

    def _ids(self, text: str) -> Ids:
        return np.array(self._plain(text), dtype=np.int64)

    def _marks_start(self) -> bool:
        """Whether tokens of a text alone differ from those behind others, whatever these are."""

        def same(lead: str, text: str) -> bool:
            apart = np.concatenate([self._ids(lead), self._ids(text)])
            return np.array_equal(apart, self._ids(lead + text))

        return not all(any(same(lead, text) for lead in _LEADS) for text in _PROBES)

    def _encode_text(self, text: str, start: bool) -> Ids:
        for lead, before in self._leads if not start else ():
            ids = self._ids(lead + text)
            if np.array_equal(ids[: len(before)], before):
                return ids[len(before) :]
        return self._ids(text)

    def encode(self, text: str) -> Ids:
        """Tokens of a text in the middle of a longer one, int64 [N]."""
        return self._encode_text(text, False)

    def reads_as_written(self, sample: Sample) -> bool:
        """Whether the tokenizer, given the whole text, gives the tokens of the sample."""
        ids = self._tokenizer.encode(sample.text, add_special_tokens=len(self.begin) > 0)
        return sample.ids.tolist() == list(ids)

    # ------------------------------------------------------------- what tasks draw from

    def rng(self, *key: str | int) -> np.random.Generator:
        """Randomness that depends on the seed and the key alone."""
        text = json.dumps([self.seed, *key])
        return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()))

    def keep(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` made when it was first asked for under this key."""
        if key not in self._kept:
            self._kept[key] = make()
        made: Made = self._kept[key]
        return made

    def haystack(
        self, name: str, units: Callable[[], Iterator[str]], before: str = "", after: str = ""
    ) -> Haystack:
        """The haystack of this name, made of `units()` when it is first asked for."""
        return self.keep(
            ("haystack", name),
            lambda: Haystack(name, units(), self.encode, before=before, after=after),
        )

    def noise(self, before: str = "", after: str = "\n") -> Haystack:
        """The noise sentences, a line of them a unit, without end."""
        line = f"{before}{NOISE}{after}"
        return self.haystack(f"noise {line!r}", lambda: cycle([line]), before, after)

    def books(self) -> Haystack:
        """Sentences of real books, one after another in one paragraph.

        Raises InputError (once tokens are asked for) where there are no books.
        """
        source = self.book.name if self.book is not None else "the books of the data folder"
        return self.haystack(source, self._sentences, before=" ")

    def _sentences(self) -> Iterator[str]:
        for text in books(self.data, self.book):
            yield from (f" {sentence}" for sentence in sentences(text))

    # ------------------------------------------------------------- prompts

    def capacity(self, task: Task, length: int, layout: Layout) -> int:
        """How many units fit beside the longest question, leaving room for others to be longer.

        For tasks whose samples share all but the question: they ask for so many `units`.
        """
        room = self.room(task, length, layout) - _VARYING
        layout.haystack.reach(max(room, 1))
        units = layout.haystack.fitting(room)
        if units < 1:
            raise self.too_short(task, length, length - room + layout.haystack.size(1))
        return units

    def sample(
        self,
        task: Task,
        length: int,
        index: int,
        layout: Layout,
        answers: Sequence[str],
        **about: Any,
    ) -> Sample:
        """The sample whose prompt and answer together are exactly `length` tokens.

        Raises InputError where the length is too short for what the layout holds, or the haystack
        too short for the length.
        """
        room, hay = self.room(task, length, layout), layout.haystack
        if layout.units is None:
            hay.reach(room)
            # One more than fits, as there may be fewer tokens than all parts have by themselves.
            most = min(hay.fitting(room) + 1, len(hay))
            tries = range(most, max(most - _TRIES, -1), -1)
        else:
            tries = range(layout.units, layout.units - 1, -1)
        for units in tries:
            written = self._write(layout, units, length - task.answer_tokens)
            if written is not None:
                ids, text = written
                return Sample(f"{task.name}-{length}-{index}", ids, text, tuple(answers), about)
        raise InputError(
            f"{task.name}: no prompt of exactly {length:,} tokens can be made with this tokenizer"
        )

    def room(self, task: Task, length: int, layout: Layout) -> int:
        """Tokens for the haystack; InputError where there are not even enough for the rest."""
        fixed = [layout.head, *(text for _, text in layout.needles), layout.close + layout.tail]
        used = len(self.begin) + sum(len(self._encode(text, False)) for text in fixed)
        if used + task.answer_tokens > length:
            raise self.too_short(task, length, used + task.answer_tokens)
        return length - task.answer_tokens - used

    def too_short(self, task: Task, length: int, needed: int) -> InputError:
        """What to raise for a length that is below what a task needs."""
        return InputError(
            f"{task.name} needs at least {needed:,} tokens with this tokenizer "
            f"({task.answer_tokens} of them for the answer), not {length:,}"
        )

    def _write(self, layout: Layout, units: int, tokens: int) -> tuple[Ids, str] | None:
        """Ids (exactly so many) and text; None where the count cannot be made exact."""
        hay = layout.haystack
        runs, last, before = self._runs(layout, units)
        parts = [self.begin]
        for number, (text, start, end) in enumerate(runs):
            parts += [self._encode(text, number == 0), hay.ids(start, end)]
        left = tokens - sum(map(len, parts))
        after = layout.filler[1] if layout.filler else hay.after

        def closing(words: str | None) -> str:
            return last + (layout.tail if words is None else before + words + after + layout.tail)

        final = self._exact(closing, left, start=not runs)
        if final is None:
            return None
        ids = np.concatenate([*parts, self._encode_text(final, not runs)])
        between = [part for text, start, end in runs for part in (text, hay.text(start, end))]
        return ids, "".join([*between, final])

    def _runs(self, layout: Layout, units: int) -> tuple[list[tuple[str, int, int]], str, str]:
        """Texts that are tokenised as one, each with the untouched units start … end behind it.

        They begin and end with the units next to what was put in. Then the last such text, which
        ends before the filler, and what the filler begins with.
        """
        hay = layout.haystack
        needles = [(hay.place(depth, units), text) for depth, text in layout.needles]
        runs, text, at = [], layout.head, 0
        opening = True  # a separator is left out
        for place, needle in [*needles, (units, layout.close)]:
            first = min(at + 1, place)
            unit = hay.text(at, first, opens=True, closes=first == place)
            text += unit.removeprefix(hay.before) if opening else unit
            if place - at > 2:
                runs.append((text, at + 1, place - 1))
                text = hay.text(place - 1, place, closes=True)
            elif place - at == 2:
                text += hay.text(at + 1, place, closes=True)
            opening = opening and place == at
            text += needle.removeprefix(hay.before) if opening else needle
            opening = needle.endswith("\n") or (opening and not needle)
            at = place
        before = layout.filler[0] if layout.filler else hay.before
        return runs, text, before.removeprefix(hay.before) if opening else before

    # ------------------------------------------------------------- the exact count

    def _exact(
        self, closing: Callable[[str | None], str], tokens: int, *, start: bool
    ) -> str | None:
        """The text of `closing` (of short words, or None for none) that has so many tokens.

        None where there is none. start: whether the prompt begins with it.
        """

        def count(words: str | None) -> int:
            return len(self._encode_text(closing(words), start))

        missing = tokens - count(None)
        if missing <= 0:
            return closing(None) if missing == 0 else None
        for words in (_noise_words, _varied_words):
            # The tokens of a row of words grow with their number; a few characters do the rest.
            row = range(1, 4 * missing)
            fitting = bisect_right(row, tokens, key=lambda n: count(words(n)))
            for number in range(fitting, max(fitting - 4, -1), -1):
                if not 0 <= tokens - count(words(number)) <= _LONGEST_ENDING:
                    continue
                for ending in _ENDINGS:
                    if count(words(number) + ending) == tokens:
                        return closing(words(number) + ending)
        return None


@lru_cache(4096)
def _noise_words(count: int) -> str:
    """So many words of the noise sentences."""
    return " ".join(islice(cycle(NOISE.split()), count))


@lru_cache(4096)
def _varied_words(count: int) -> str:
    """So many short words that follow one another without order.

    For tokenizers that merge over spaces, and know the noise sentences so well that many of them
    make few tokens.
    """
    draws = np.random.default_rng(0).integers(len(_WORDS), size=count)
    return " ".join(_WORDS[draw] for draw in draws)
