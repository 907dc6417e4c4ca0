"""Generation for many prompts at once, greedy unless told otherwise: all evaluations use this.

Axes: B batch rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkvx_evals.models.reader import Reader, State

# Decoded beside the longest stop string, so that a character cut in two cannot hide one.
SLACK_CHARACTERS = 8
# Draws a token id from the float32 logits [V] of one row.
Draw = Callable[[Tensor], int]


@dataclass(frozen=True)
class Limit:
    """Where an answer ends.

    Attributes:
        tokens: at most so many.
        stop: strings that end it and are no part of it.
        draw: how each token is chosen; None for the most likely one.
    """

    tokens: int
    stop: tuple[str, ...] = ()
    draw: Draw | None = None


@dataclass(frozen=True)
class Answer:
    """What a model generated, without the stop string.

    status: "ok", or "invalid" where logits were not numbers; then the text ends before them.
    """

    text: str
    tokens: tuple[int, ...] = ()
    status: str = "ok"


def cut_at(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop string, and whether there was one."""
    places = [place for s in stop if s and (place := text.find(s)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


@torch.inference_mode()
def generate(
    model: Reader, logits_B1V: Tensor, state: State, limits: Sequence[Limit]
) -> list[Answer]:
    """A continuation of every row, token by token.

    Args:
        logits_B1V: after each row's prompt. state: the same moment's; it is used up.
        limits: one for each row.
    """
    rows = [_Row(model, limit) for limit in limits]
    longest = max(limit.tokens for limit in limits)
    step = model.steps(state, longest)
    for count in range(1, longest + 1):
        logits_BV = logits_B1V[:, -1].float()
        finite = is_finite(logits_BV).tolist()
        chosen = logits_BV.argmax(dim=-1).tolist()
        for i, row in enumerate(rows):
            draw = row.limit.draw
            if draw is not None and row.answer is None and finite[i]:
                chosen[i] = draw(logits_BV[i])
            row.add(chosen[i], finite[i])
        if count == longest or all(row.answer for row in rows):
            break
        logits_B1V = step(torch.tensor(chosen, device=logits_BV.device)[:, None])
    return [row.finished() for row in rows]


def is_finite(logits_BV: Tensor) -> Tensor:
    """Which rows hold numbers, bool [B]; -inf is one, as some models mask unused tokens so."""
    largest, lowest = logits_BV.amax(dim=-1), logits_BV.amin(dim=-1)
    return torch.isfinite(largest) & ~torch.isnan(lowest)


class _Row:
    """One answer in the making."""

    def __init__(self, model: Reader, limit: Limit) -> None:
        self.model, self.limit = model, limit
        self.tokens: list[int] = []
        self.answer: Answer | None = None
        self._stop_length = max((len(s) for s in limit.stop), default=0)

    def add(self, token: int, finite: bool) -> None:
        """Takes one more token, unless the answer has ended."""
        if self.answer is not None:
            return
        if not finite:
            self.answer = Answer(self._text(), tuple(self.tokens), "invalid")
            return
        if token in self.model.end_ids:
            self.answer = self.finished()
            return
        self.tokens.append(token)
        if len(self.tokens) >= self.limit.tokens or self._has_ended():
            self.answer = self.finished()

    def finished(self) -> Answer:
        """The answer, as far as it goes."""
        return self.answer or Answer(cut_at(self._text(), self.limit.stop)[0], tuple(self.tokens))

    def _text(self) -> str:
        return self.model.decode(self.tokens) if self.tokens else ""

    def _has_ended(self) -> bool:
        return bool(self._stop_length) and cut_at(self._end(), self.limit.stop)[1]

    def _end(self) -> str:
        """The last characters, enough to hold a stop string: decoding all of a long answer again
        for every token would take longer than generating it."""
        wanted = self._stop_length + SLACK_CHARACTERS
        count = wanted
        while True:
            text = self.model.decode(self.tokens[-count:])
            if len(text) >= wanted or count >= len(self.tokens):
                return text
            count *= 2
