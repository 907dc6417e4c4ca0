"""What the evaluations need of a model, and the few operations that they share.

Axes: B batch rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor

import rwkvx
import rwkvx.state
from rwkvx.state import ModelState

State = Any
Advance = Callable[[int], None]


class Tokenizer(Protocol):
    """The part of a tokenizer that the evaluations use."""

    @property
    def eos_token_id(self) -> int: ...

    def encode(self, text: str, /, *, add_special_tokens: bool = ...) -> list[int]: ...

    def decode(self, ids: list[int], /) -> str: ...


class LanguageModel(Protocol):
    """`rwkvx.Model`, or anything that behaves like it."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    def fingerprint(self) -> str: ...

    def __call__(
        self, ids: Tensor, state: State = None, logits: str = "all"
    ) -> tuple[Tensor | None, State]: ...


class StateTools:
    """Making, forking and choosing rows of a state; tests replace it for models of their own."""

    def fresh(self, model: Any, tokens: int, rows: int = 1) -> State:
        """Before the first token of `rows` sequences, with room for so many tokens of each.

        A cache that grows step by step holds old and new together.
        """
        return model.fresh_state(rows, tokens) if isinstance(model, rwkvx.Model) else None

    def repeat(self, state: State, rows: int) -> State:
        """Every batch row `rows` times, copies side by side."""
        return state if rows == 1 else rwkvx.repeat_state(state, rows)

    def select(self, state: State, rows: Tensor) -> State:
        """The batch rows named by `rows`, int64 `[B']`."""
        return rwkvx.select_state(state, rows)

    def join(self, states: Sequence[State]) -> State:
        """States after equally many tokens as one batch, rows in order."""
        singles = [
            self.select(state, torch.tensor([row])) if state.rows > 1 else state
            for state in states
            for row in range(state.rows)
        ]
        blocks = zip(*(state.blocks for state in singles), strict=True)
        return ModelState(tuple(_join_blocks(parts) for parts in blocks), singles[0].length)

    def bytes(self, state: State) -> int:
        """Memory that the state takes."""
        return rwkvx.state.state_bytes(state)


def _join_blocks(parts: Sequence[Any]) -> Any:
    """Block states of one row each as one: tensors row by row, caches side by side."""
    fields: list[Any] = []
    for values in zip(*parts, strict=True):
        if isinstance(values[0], Tensor):
            fields.append(torch.cat(values))
        else:
            fields.append(None if values[0] is None else tuple(chain.from_iterable(values)))
    return type(parts[0])(*fields)


def device_of(model: Any) -> torch.device:
    """Where the model's weights are; the CPU for a model without any."""
    parameters = getattr(model, "parameters", None)
    first = next(iter(parameters()), None) if callable(parameters) else None
    return first.device if isinstance(first, Tensor) else torch.device("cpu")
