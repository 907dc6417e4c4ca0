"""A model that reads tokens on this machine, as the evaluations see it.

Axes: B batch rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rwkvx_evals.interface import Advance, Tokenizer

ROWS = 16
State = Any
Ids = NDArray[np.int64]
Step = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Frame:
    """Token ids around every prompt: what starts a document, a chat template.

    start: so many of the first ones are also what the tokenizer itself puts before a text, and so
    are part of a prompt already.
    """

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    start: int = 0

    @property
    def added(self) -> int:
        """Tokens that the frame adds to a prompt."""
        return len(self.before) + len(self.after) - self.start

    def around(self, ids: Ids) -> Ids:
        """The prompt inside its frame, int64 [T]; a document is started once."""
        start = self.before[: self.start]
        if start and tuple(ids[: self.start].tolist()) == start:
            ids = ids[self.start :]
        return np.concatenate([np.asarray(self.before, np.int64), ids, self.after]).astype(np.int64)


class Reader(Protocol):
    """What the engine, the generator and the measures need of a model.

    A state belongs to whoever has it: `read` and `steps` use it up, and only what they return goes
    on. `branch` lends a copy, or the state itself where that can be put back afterwards.

    Attributes:
        name: for reports and folder names.
        max_length: tokens of prompt and answer together; None: no limit.
        end_ids: tokens that end a document, and with it an answer.
        frame: what stands around every prompt.
        rows: prompts to read together at most, unless told otherwise.
        segment: tokens (all rows together) to read in one call.
        continues: whether several tokens may be read onto a state. If not, a prompt is read in one
            call, and what follows token by token.
        joins: whether states can be joined.
    """

    @property
    def name(self) -> str: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def max_length(self) -> int | None: ...

    @property
    def end_ids(self) -> frozenset[int]: ...

    @property
    def frame(self) -> Frame: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def rows(self) -> int: ...

    @property
    def segment(self) -> int: ...

    @property
    def continues(self) -> bool: ...

    @property
    def joins(self) -> bool: ...

    def fingerprint(self) -> str:
        """Hash of the weights (hexadecimal)."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids."""
        ...

    def start(self, rows: int, room: int) -> State:
        """Before the first token of `rows` sequences of up to `room` tokens."""
        ...

    def read(self, ids_BT: Tensor, state: State, logits: str) -> tuple[Tensor | None, State]:
        """Reads int64 ids on the model's device.

        logits: "all" -> [B, T, V], "last" -> [B, 1, V], "none" -> None.
        """
        ...

    def logits_in_slices(self, ids_BT: Tensor, first: int, width: int) -> Iterator[Tensor]:
        """Logits after the tokens `first` to the last of new sequences, [B, up to width, V] each.

        Never those of a whole text at once: at a million tokens they fit nowhere.
        """
        ...

    def branch(
        self, state: State, rows: int, *, keep: bool = False
    ) -> AbstractContextManager[State]:
        """`rows` copies of a state of one row, to go on from; afterwards `state` is as before.

        keep: the copies are used after the context too.
        """
        ...

    def join(self, states: Sequence[State]) -> State:
        """States after equally many tokens as one batch, rows in order; they are used up."""
        ...

    def steps(self, state: State, tokens: int) -> Step:
        """A function from ids [B, 1] to the logits [B, 1, V] after them, for up to `tokens`."""
        ...


def read_prompt(
    model: Reader, ids_BT: Tensor, state: State, logits: str, advance: Advance | None = None
) -> tuple[Tensor | None, State]:
    """Reads `ids_BT` in segments, so that progress can be shown and memory stays flat.

    logits: "none", or "last" for `[B, 1, V]` after the last token.
    advance: told the number of tokens (all rows together) after each segment.
    """
    rows, total = ids_BT.shape
    width = max(1, model.segment // rows) if model.continues else total
    out: Tensor | None = None
    for start in range(0, total, width):
        part = ids_BT[:, start : start + width]
        out, state = model.read(part, state, logits if start + width >= total else "none")
        if advance is not None:
            advance(part.numel())
    return out, state


def slices_by_reading(model: Reader, ids_BT: Tensor, first: int, width: int) -> Iterator[Tensor]:
    """`Reader.logits_in_slices` of a model that goes on from what it read."""
    rows, total = ids_BT.shape
    state = model.start(rows, total)
    if first:
        _, state = read_prompt(model, ids_BT[:, :first], state, "none")
    for start in range(first, total, width):
        logits, state = model.read(ids_BT[:, start : start + width], state, "all")
        assert logits is not None
        yield logits
