"""What a model answered, and how the journal writes it down."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rwkvx_evals.journal import Row

STATUSES = ("ok", "invalid", "oom")


@dataclass(frozen=True)
class Score:
    """A log-probability. status: "ok", "invalid" (logits that are no numbers) or "oom" (out of
    memory); in the latter two logprob is None."""

    logprob: float | None
    greedy: bool
    status: str = "ok"


@dataclass(frozen=True)
class Text:
    """What was generated, without the stop string; status as in `Score`."""

    text: str
    status: str = "ok"


def check_row(row: Row) -> None:
    """Raises ValueError, saying why, for a row that `score_of` or `text_of` cannot read."""
    kinds = {"loglikelihood": _check_score, "generate": _check_text}
    kind = row.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError("its kind is neither loglikelihood nor generate")
    if row.get("status") not in STATUSES:
        raise ValueError(f"its status is none of {', '.join(STATUSES)}")
    kinds[kind](row)


def _check_score(row: Row) -> None:
    logprob = row.get("logprob", "")
    number = isinstance(logprob, float) and math.isfinite(logprob)
    if row["status"] == "ok" and not number:
        raise ValueError("its logprob is not a number")
    if row["status"] != "ok" and logprob is not None:
        raise ValueError("it failed and has a logprob")
    if not isinstance(row.get("greedy"), bool):
        raise ValueError("its greedy is neither true nor false")


def _check_text(row: Row) -> None:
    if not isinstance(row.get("text"), str):
        raise ValueError("its text is not a text")


def score_of(row: Row | None) -> Score | None:
    """The score in a row; None where there is none yet, and where memory ran out for it."""
    if row is None or row["kind"] != "loglikelihood" or row["status"] == "oom":
        return None
    return Score(row["logprob"], row["greedy"], row["status"])


def text_of(row: Row | None) -> Text | None:
    """The text in a row; None as in `score_of`."""
    if row is None or row["kind"] != "generate" or row["status"] == "oom":
        return None
    return Text(row["text"], row["status"])
