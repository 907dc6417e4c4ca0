"""Rows cut out of a long stream of documents: shared by every kind of plain text.

Axes: R rows, T time.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rwkvx.data.sources.contract import Ids, Rows, Source, Wanted, even_weights
from rwkvx.data.sources.reader import Stream
from rwkvx.errors import InputError


class Windows:
    """The stream cut into windows of T tokens, in a random order, each once before any again.

    Args:
        separate: documents forget one another: each starts at the end of the one before, which is
            what begins a text in generation too.
        held_out: for evaluation, None for none.
    """

    def __init__(self, stream: Stream, separate: bool, held_out: Stream | None) -> None:
        self.stream, self.separate, self.held_out = stream, separate, held_out
        self._order: tuple[object, Ids] | None = None

    def rows(self, wanted: Wanted) -> Rows:
        total = len(self.stream.tokens)
        count = (total - 1) // wanted.length
        if count < 1:
            raise InputError(f"the text has {total} tokens, a sequence needs {wanted.length + 1}")
        starts = []
        for number in wanted.numbers:
            epoch, index = divmod(number, count)
            starts.append(self._ordered((*wanted.order, epoch), count, wanted.length)[index])
        return cut(self.stream, np.asarray(starts), wanted.length, self.separate)

    def evaluations(self) -> dict[str, Source]:
        return {} if self.held_out is None else {"eval": HeldOut(self.held_out, self.separate)}

    def identity(self) -> dict[str, Any]:
        return {"content": self.stream.identity, "separate": self.separate}

    def _ordered(self, seed: tuple[int, ...], count: int, length: int) -> Ids:
        """Where the windows of an epoch start, in its order; windows are cut anew in each."""
        key = (seed, count, length)
        if self._order is None or self._order[0] != key:
            rng = np.random.default_rng(seed)
            spare = len(self.stream.tokens) - 1 - count * length
            shift = int(rng.integers(0, spare + 1))
            self._order = (key, rng.permutation(count) * length + shift)
        return self._order[1]


class HeldOut:
    """Windows for evaluation, always the same; as long as there is text for."""

    def __init__(self, stream: Stream, separate: bool) -> None:
        self.stream, self.separate = stream, separate

    def rows(self, wanted: Wanted) -> Rows:
        length = min(wanted.length, len(self.stream.tokens) - 1)
        if length < 1:
            raise InputError(
                f"the text for evaluation has {len(self.stream.tokens)} tokens: raise eval_share, "
                "or set it to 0 for no evaluation"
            )
        count = (len(self.stream.tokens) - 1) // length
        order = np.random.default_rng(0).permutation(count)
        starts = order[np.asarray(wanted.numbers) % count] * length
        return cut(self.stream, starts, length, self.separate)

    def evaluations(self) -> dict[str, Source]:
        return {}

    def identity(self) -> dict[str, Any]:
        return {"content": self.stream.identity, "separate": self.separate}


def cut(stream: Stream, starts: Ids, length: int, separate: bool) -> Rows:
    """Windows of `length` + 1 tokens from `starts`; every target counts alike."""
    ids = np.stack([stream.tokens[s : s + length + 1] for s in starts]).astype(np.int64)
    shape = (len(starts), length)
    begins = _begins(stream.documents, starts, length) if separate else np.zeros(shape, dtype=bool)
    return Rows(ids, even_weights(shape), np.zeros(shape, dtype=bool), begins)


def _begins(documents: Ids, starts: Sequence[int] | Ids, length: int) -> NDArray[np.bool]:
    """The end of a document, as an input, begins the next one."""
    begins = np.zeros((len(starts), length), dtype=bool)
    ends = documents[1:-1] - 1
    for row, start in enumerate(starts):
        first, last = np.searchsorted(ends, (start, start + length))
        begins[row, ends[first:last] - start] = True
    return begins
