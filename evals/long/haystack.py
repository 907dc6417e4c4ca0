"""Text in units (lines, sentences, records) that tokenise alone.

Where tokens(a + b) == tokens(a) + tokens(b) for all neighbours, the tokens of a prompt are slices
of an array that was made once, and something can be put between two units without disturbing the
tokens of any other. That holds for most places in a text, and is checked for every one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import islice, pairwise

import numpy as np
from numpy.typing import NDArray

from rwkvx.errors import InputError
from rwkvx_evals.long.task import Ids

Encode = Callable[[str], Ids]

_BLOCK = 64  # units that are checked by one encoding of all of them
_CLOSE = 64  # tokens below a limit that need no further trying
_BESIDE = range(-4, 5)  # characters from a place to its cut
_LONGEST = 4096  # characters of a unit, after which a place is taken for separable in any case


class Haystack:
    """Units read from a source as far as lengths ask for them, with their tokens.

    A place is where a unit begins. Its cut is where the tokens are cut for it: there, or a few
    characters beside it where a token holds, say, the line break and the space around it. Where the
    tokenizer merges over all of these, there is no place, and the two units become one.

    Attributes:
        name: for messages and reports.
        before, after: what every unit begins and ends with.
        exact: False once cuts had to be made where tokens merge, with a tokenizer that merges over
            spaces and line breaks nearly everywhere: lengths stay exact, but the whole text would
            be tokenised otherwise there.
        tokens: tokens of all units so far.
    """

    def __init__(
        self, name: str, units: Iterable[str], encode: Encode, *, before: str = "", after: str = ""
    ) -> None:
        self.name, self.before, self.after = name, before, after
        self.exact = True
        self.tokens = 0
        self._source = iter(units)
        self._encode = lru_cache(512)(encode)  # for lines and numbers that come again and again
        # What the last unit is, and how far its cut is behind its place: its end is still open.
        self._pending: tuple[str, int] | None = None
        self._moved = 0  # from the last place to its cut, in characters
        self._new: list[tuple[str, Ids, int]] = []
        self._text = ""
        self._ids: Ids = np.empty(0, dtype=np.int64)
        # Of place k, in front of unit k: its cut in tokens and in characters, and how far behind
        # the place the cut is, in characters; int64 [units + 1].
        self._token_at: Ids = np.zeros(1, dtype=np.int64)
        self._cut_at: Ids = np.zeros(1, dtype=np.int64)
        self._shift: Ids = np.zeros(1, dtype=np.int64)

    @classmethod
    def ready(
        cls, name: str, text: str, ids: Ids, tokens: Ids, chars: Ids, before: str = ""
    ) -> Haystack:
        """A whole text with its tokens, cut into units of so many tokens and characters."""
        made = cls(name, (), lambda text: np.empty(0, dtype=np.int64), before=before)
        made._text, made._ids, made.tokens = text, ids, len(ids)
        made._token_at = np.append(0, np.cumsum(tokens))
        made._cut_at = np.append(0, np.cumsum(chars))
        made._shift = np.zeros_like(made._cut_at)
        return made

    def __len__(self) -> int:
        """Units so far."""
        return len(self._token_at) - 1

    # ------------------------------------------------------------- reading

    def reach(self, tokens: int) -> None:
        """Reads on beyond so many tokens; InputError where the source ends before them.

        Beyond, so that the unit after them is there whatever else was asked for before.
        """
        while self.tokens <= tokens:
            block = list(islice(self._source, _BLOCK))
            if not block and self._pending is None:
                break
            self._append(block)
        self._settle()
        if self.tokens < tokens:
            raise InputError(
                f"{self.name} has {self.tokens:,} tokens, and a prompt of this length needs "
                f"{tokens:,}: ask for shorter ones or give more text"
            )

    def _append(self, block: list[str]) -> None:
        pending, shift = self._pending or ("", 0)
        units = [pending, *block] if self._pending else block
        whole = "".join(units)
        # The cut of the last place is likely to be that of the next ones.
        moved = self._moved if min(map(len, units)) > abs(self._moved) else 0
        places = np.cumsum([len(unit) for unit in units]).tolist()
        cuts = [0, *(place + moved for place in places[:-1]), places[-1]]
        texts = [whole[start:end] for start, end in pairwise(cuts)]
        parts = [self._encode(text) for text in texts]
        shifts = [shift, *[moved] * (len(units) - 1)]
        if not np.array_equal(np.concatenate(parts), self._encode(whole)):
            texts, parts, shifts = self._separate(units, shift)
        # Without a block the source has ended, and nothing follows the last unit.
        keep = len(texts) - 1 if block else len(texts)
        self._pending = (texts[-1], shifts[-1]) if block else None
        self._new += list(zip(texts[:keep], parts[:keep], shifts[:keep], strict=True))
        self.tokens += sum(map(len, parts[:keep]))

    def _separate(self, units: list[str], shift: int) -> tuple[list[str], list[Ids], list[int]]:
        """The same text with a cut for each place that has one, and without the other places."""
        texts, parts, shifts = [units[0]], [self._encode(units[0])], [shift]
        for unit in units[1:]:
            both, place = texts[-1] + unit, len(texts[-1])
            moved = self._cut(both, place)
            if moved is None and place <= _LONGEST:
                texts[-1], parts[-1] = both, self._encode(both)
                continue
            self._moved = moved or 0
            texts[-1:] = both[: place + self._moved], both[place + self._moved :]
            parts[-1:] = map(self._encode, texts[-2:])
            shifts.append(self._moved)
        self.exact &= np.array_equal(np.concatenate(parts), self._encode("".join(texts)))
        return texts, parts, shifts

    def _cut(self, text: str, place: int) -> int | None:
        """How far from a place its tokens can be cut, in characters; None where they cannot."""
        ids = self._encode(text)
        for moved in sorted(_BESIDE, key=lambda by: (by != self._moved, abs(by))):
            left, right = text[: place + moved], text[place + moved :]
            if left and right:
                apart = np.concatenate([self._encode(left), self._encode(right)])
                if np.array_equal(ids, apart):
                    return moved
        return None

    def _settle(self) -> None:
        """Moves what was read into the arrays."""
        if not self._new:
            return
        texts, ids, shifts = zip(*self._new, strict=True)
        ends = [np.cumsum([len(part) for part in parts]) for parts in (ids, texts)]
        self._token_at = np.append(self._token_at, self._token_at[-1] + ends[0])
        self._cut_at = np.append(self._cut_at, self._cut_at[-1] + ends[1])
        following = self._pending[1] if self._pending else 0
        self._shift = np.append(self._shift, [*shifts[1:], following])
        self._ids = np.concatenate([self._ids, *ids])
        self._text += "".join(texts)
        self._new = []

    # ------------------------------------------------------------- units and places

    def fitting(self, tokens: int) -> int:
        """The largest number of units, from the first on, with at most so many tokens."""
        return int(np.searchsorted(self._token_at, tokens, side="right")) - 1

    def size(self, units: int) -> int:
        """Tokens of the first `units` units."""
        return int(self._token_at[units])

    def place(self, depth: float, units: int) -> int:
        """The place 0 … `units` nearest to a depth 0 … 1 of the first `units` units, by tokens."""
        at = depth * self.size(units)
        after = min(int(np.searchsorted(self._token_at[: units + 1], at)), units)
        if after and at - self._token_at[after - 1] < self._token_at[after] - at:
            return after - 1
        return after

    def holds(self, text: str, tokens: int) -> bool:
        """Whether a text occurs in the units of the first so many tokens."""
        self.reach(tokens)
        return text in self.text(0, self.fitting(tokens))

    def ids(self, start: int, end: int) -> Ids:
        """Tokens between the cuts of the places `start` and `end`, int64 [N]; a view."""
        return self._ids[self._token_at[start] : self._token_at[end]]

    def text(self, start: int, end: int, *, opens: bool = False, closes: bool = False) -> str:
        """The text between the cuts of the places `start` and `end`.

        opens, closes: from the place `start` itself, to the place `end` itself.
        """
        first = self._cut_at[start] - (self._shift[start] if opens else 0)
        last = self._cut_at[end] - (self._shift[end] if closes else 0)
        return self._text[first:last]


class Table:
    """Short texts whose tokens may stand in a row in any order that is like the one checked."""

    def __init__(
        self, texts: Sequence[str], encode: Encode, order: NDArray[np.int64] | None = None
    ) -> None:
        """order: a row in which every text occurs, int64 [N]; by default one after another."""
        self.texts = texts
        self._encode = encode
        parts = [encode(text) for text in texts]
        self.sizes = np.array([len(part) for part in parts], dtype=np.int64)
        self._lengths = np.array([len(text) for text in texts], dtype=np.int64)
        self._flat = np.concatenate(parts)
        self._starts = np.cumsum(self.sizes) - self.sizes
        order = np.arange(len(texts)) if order is None else order
        self.separable = np.array_equal(encode(self._text(order)), self._gather(order))

    def _text(self, order: NDArray[np.int64]) -> str:
        return "".join(map(self.texts.__getitem__, order.tolist()))

    def _gather(self, order: NDArray[np.int64]) -> Ids:
        sizes = self.sizes[order]
        ends = np.cumsum(sizes)
        shifts = np.repeat(self._starts[order] - (ends - sizes), sizes)
        return self._flat[shifts + np.arange(len(shifts))]

    def row(self, name: str, order: NDArray[np.int64], before: str = "") -> Haystack:
        """The texts in an order, int64 [N], as a haystack of N units.

        Where tokens merge from one text to the next it is one unit, which is tokenised whole.
        """
        text = self._text(order)
        if self.separable:
            sizes, lengths = self.sizes[order], self._lengths[order]
            return Haystack.ready(name, text, self._gather(order), sizes, lengths, before)
        ids = self._encode(text)
        whole = np.array([len(ids)]), np.array([len(text)])
        return Haystack.ready(name, text, ids, *whole, before)


def longest(make: Callable[[int], Haystack], room: int) -> Haystack:
    """The longest haystack with at most `room` tokens that `make` gives for a few budgets.

    make: a haystack for a budget of tokens. It keeps to it, except where the tokenizer merges over
    the ends of units: then the count is another, and the budget is changed by the difference.
    """
    budget, best = room, EMPTY
    for _ in range(6):
        made = make(budget)
        left = room - made.tokens
        if left >= 0 and made.tokens >= best.tokens:
            best = made
        if 0 <= left < _CLOSE:
            break
        budget += left if left > 0 else left - _CLOSE // 2
    return best


_NONE = np.empty(0, dtype=np.int64)
EMPTY = Haystack.ready("nothing", "", _NONE, _NONE, _NONE)
