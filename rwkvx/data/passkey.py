"""The passkey prompt, with exact token lengths.

    task line
    filler …
    The pass key is N. Remember it. N is the pass key.
    filler …
    What is the pass key? The pass key is

The words are those of the published test. A prompt is a concatenation of separately tokenised
parts: the filler is tokenised once and cut by tokens, so that a prompt of a million tokens costs
one array copy. The parts are cut so that everything before the needle depends on the length and
the depth alone, never on the key: an evaluation reads that prefix once and forks its state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rwkvx.errors import InputError

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
STANDARD_FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
)
QUESTION = "What is the pass key? The pass key is"
MIN_KEY, MAX_KEY = 1, 50_000

Ids = NDArray[np.int64]


class Encoder(Protocol):
    """The part of a tokenizer that prompts need."""

    @property
    def eos_token_id(self) -> int: ...

    def encode(self, text: str, /, *, add_special_tokens: bool = ...) -> list[int]: ...


def needle_text(key: int) -> str:
    """The line that holds the key."""
    return f"The pass key is {key}. Remember it. {key} is the pass key."


def draw_key(seed: int, length: int, depth: float) -> int:
    """The key of one sample, 1 … 50 000: the same on every machine, in any order of running."""
    rng = np.random.default_rng((seed, length, round(depth * 1_000_000)))
    return int(rng.integers(MIN_KEY, MAX_KEY + 1))


@dataclass(frozen=True)
class Filler:
    """An endless run of irrelevant tokens: `head` once, then `period` again and again."""

    name: str
    head: Ids
    period: Ids

    @property
    def natural_length(self) -> int:
        """Tokens before the text starts to repeat."""
        return len(self.head) + len(self.period)

    def take(self, start: int, count: int) -> Ids:
        """Tokens `start` … `start + count`, int64 `[count]`."""
        from_head = self.head[start : start + count]
        offset = start + len(from_head) - len(self.head)
        missing = count - len(from_head)
        first = offset % len(self.period)
        repeats = -(-(first + missing) // len(self.period))
        tiled = np.tile(self.period, repeats)[first : first + missing]
        return np.concatenate([from_head, tiled])


def _encode(tokenizer: Encoder, text: str) -> Ids:
    return np.asarray(tokenizer.encode(text, add_special_tokens=False), dtype=np.int64)


def standard_filler(tokenizer: Encoder) -> Filler:
    """The published filler sentences, joined by spaces."""
    return Filler(
        "standard", _encode(tokenizer, STANDARD_FILLER), _encode(tokenizer, " " + STANDARD_FILLER)
    )


def prose_filler(tokenizer: Encoder, text: str, name: str) -> Filler:
    """Real prose; starts again after its end (a prompt beyond `natural_length` repeats it)."""
    return Filler(name, np.empty(0, dtype=np.int64), _encode(tokenizer, text.strip() + "\n\n"))


@dataclass(frozen=True)
class PasskeyPrompt:
    """One prompt in the two pieces that an evaluation reads; `prefix` does not depend on the key.

    prefix: task line and the filler before the needle, int64 `[P]`.
    tail: needle line, the filler after it, the question, int64 `[length - P]`.
    """

    key: int
    prefix: Ids
    tail: Ids

    @property
    def ids(self) -> Ids:
        """The whole prompt, int64 `[length]`."""
        return np.concatenate([self.prefix, self.tail])

    @property
    def needle_start(self) -> int:
        """Index in `ids` of the first token of the needle line."""
        return len(self.prefix)


class PasskeyBuilder:
    """Builds prompts for one tokenizer; the fixed parts are tokenised once."""

    def __init__(self, tokenizer: Encoder) -> None:
        self._tokenizer = tokenizer
        self._task = _encode(tokenizer, TASK + "\n")
        self._question = _encode(tokenizer, "\n" + QUESTION)
        # Keys of equal digits may differ in tokens, so the room is the largest over a spread of
        # keys (a prime step visits every digit in every place); a test checks all of them.
        keys = range(10_007, MAX_KEY, 241)
        self._needle_room = max(len(self.needle(key)) for key in (*keys, MAX_KEY))

    def encode(self, text: str) -> Ids:
        """Tokens of any text, int64 `[N]`."""
        return _encode(self._tokenizer, text)

    def needle(self, key: int) -> Ids:
        """The needle line between its line breaks, int64 `[N]`."""
        return _encode(self._tokenizer, f"\n{needle_text(key)}\n")

    def answer(self, key: int) -> Ids:
        """What training teaches after the question: ` N.` and the end of document, int64 `[A]`."""
        return np.append(
            _encode(self._tokenizer, f" {key}."), np.int64(self._tokenizer.eos_token_id)
        )

    @property
    def question(self) -> Ids:
        """The question after its line break, int64 `[Q]`."""
        return self._question

    @property
    def minimum(self) -> int:
        """The shortest prompt in tokens: no filler at all, and the longest needle."""
        return len(self._task) + self._needle_room + len(self._question)

    def prefix_length(self, length: int, depth: float) -> int:
        """Tokens before the needle in a prompt of `length` tokens; independent of the key.

        depth: 0.0 puts the needle right after the task line, 1.0 right before the question.
        Raises InputError for a length below `minimum` and a depth outside 0 … 1.
        """
        if not 0.0 <= depth <= 1.0:
            raise InputError(f"passkey depth {depth} is not between 0 and 1")
        if length < self.minimum:
            raise InputError(
                f"passkey length {length} is below the prompt's own: "
                f"at least {self.minimum} tokens with this tokenizer"
            )
        return len(self._task) + int(depth * (length - self.minimum))

    def prefix(self, filler: Filler, length: int, depth: float, *, offset: int = 0) -> Ids:
        """Task line and the filler before the needle, int64 `[prefix_length]`."""
        count = self.prefix_length(length, depth) - len(self._task)
        return np.concatenate([self._task, filler.take(offset, count)])

    def tail(self, filler: Filler, length: int, depth: float, key: int, *, offset: int = 0) -> Ids:
        """Needle line, the filler after it, the question: int64 `[length - prefix_length]`."""
        before = self.prefix_length(length, depth)
        needle = self.needle(key)
        count = length - before - len(needle) - len(self._question)
        start = offset + before - len(self._task)
        return np.concatenate([needle, filler.take(start, count), self._question])

    def build(
        self, filler: Filler, length: int, depth: float, key: int, *, offset: int = 0
    ) -> PasskeyPrompt:
        """A prompt of exactly `length` tokens whose filler starts at token `offset` of `filler`."""
        return PasskeyPrompt(
            key,
            self.prefix(filler, length, depth, offset=offset),
            self.tail(filler, length, depth, key, offset=offset),
        )
