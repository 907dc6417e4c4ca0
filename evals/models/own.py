"""Models of this package, and whatever is called like them.

Axes: B batch rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import rwkvx
from rwkvx import decoding
from rwkvx_evals.interface import LanguageModel, StateTools, Tokenizer, device_of
from rwkvx_evals.models.reader import ROWS, Frame, State, Step, slices_by_reading

SEGMENT = 16_384
# Reading weights once for many rows gains nothing where they stay in the caches of a CPU, and a
# row alone is decoded by compiled loops: a token of passkey-tiny takes 1.4 ms, of two rows 9.4 ms.
SMALL_BYTES = 32_000_000


@dataclass
class OwnModel:
    """`rwkvx.Model` as a `Reader`; its states are never changed, so that a fork costs nothing.

    tools: how states are forked, for models that only behave like ours.
    """

    model: LanguageModel
    name: str = "model"
    tools: StateTools = field(default_factory=StateTools)
    max_length: int | None = None
    segment: int = SEGMENT
    continues: bool = True
    joins: bool = True
    frame: Frame = field(default_factory=Frame)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.model.tokenizer

    @property
    def end_ids(self) -> frozenset[int]:
        return frozenset({int(self.tokenizer.eos_token_id)})

    @property
    def vocab_size(self) -> int:
        config: Any = getattr(self.model, "config", None)
        return int(config.vocab_size)

    @property
    def device(self) -> torch.device:
        return device_of(self.model)

    @property
    def rows(self) -> int:
        if not isinstance(self.model, rwkvx.Model) or self.device.type != "cpu":
            return ROWS
        size = sum(weight.numel() * weight.element_size() for weight in self.model.parameters())
        return 1 if size <= SMALL_BYTES else ROWS

    def fingerprint(self) -> str:
        return self.model.fingerprint()

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids))

    def start(self, rows: int, room: int) -> State:
        return self.tools.fresh(self.model, room, rows)

    def read(self, ids_BT: Tensor, state: State, logits: str) -> tuple[Tensor | None, State]:
        return self.model(ids_BT, state=state, logits=logits)

    def logits_in_slices(self, ids_BT: Tensor, first: int, width: int) -> Iterator[Tensor]:
        return slices_by_reading(self, ids_BT, first, width)

    @contextmanager
    def branch(self, state: State, rows: int, *, keep: bool = False) -> Iterator[State]:
        yield self.tools.repeat(state, rows)

    def join(self, states: Sequence[State]) -> State:
        return self.tools.join(states)

    def steps(self, state: State, tokens: int) -> Step:
        return decoding.start(self.model, state, tokens).step
