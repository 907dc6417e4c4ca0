"""The rows of a run's journal: answers of samples, losses of windows, costs of units."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

_NUMBER = (int, float)
_COMMON: dict[str, tuple[type, ...]] = {"key": (str,), "attempt": (int,), "length": (int,)}
_ASKED = {**_COMMON, "id": (str,), "task": (str,), "index": (int,), "prompt": (str,),
          "status": (str,)}  # fmt: skip
# Every field that is read again, by the kind of row.
FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "sample": {
        **_ASKED, "score": _NUMBER, "answer": (str,), "expected": (list,), "about": (dict,),
        "prompt_tokens": (int,), "answer_tokens": (int,), "tokens": (list,), "truncated": (int,),
    },
    "window": {
        **_ASKED, "book": (str,), "start": (int,), "buckets": (list,), "compared": (int,),
        "key_tokens": (int,), "key_loss": _NUMBER,
    },
    "unit": {
        **_COMMON, "seconds": _NUMBER, "read": (int,), "generated": (int,),
        "peak_bytes": (int, type(None)),
    },
}  # fmt: skip
# "ok", and the kinds of failure: no memory, logits that are not numbers, no answer of an endpoint.
FAILURES = ("oom", "invalid", "error")
STATUSES = ("ok", *FAILURES)


def check_row(row: Any) -> None:
    """Raises ValueError, saying why, for anything that is no row of a journal."""
    kind = row.get("kind") if isinstance(row, dict) else None
    if not isinstance(kind, str) or kind not in FIELDS:
        raise ValueError("it is of no known kind")
    check_fields(row, kind)


def check_fields(row: Any, kind: str, without: Set[str] = frozenset()) -> None:
    """As `check_row`, for a row whose kind is known, and whose fields `without` are not there."""
    for name, types in FIELDS[kind].items():
        if name not in without and (not isinstance(row, dict) or type(row.get(name)) not in types):
            raise ValueError(f"its {name} is missing or of another kind")
    if kind != "unit" and row["status"] not in STATUSES:
        raise ValueError(f"its status is none of {', '.join(STATUSES)}")
    if kind == "sample":
        if not 0 <= row["score"] <= 1:
            raise ValueError("its score is not between 0 and 1")
        if not all(isinstance(answer, str) for answer in row["expected"]):
            raise ValueError("its expected holds other things than texts")
    if kind == "window":
        if not all(_is_bucket(bucket) for bucket in row["buckets"]):
            raise ValueError("its buckets are not [from, to, tokens, loss]")
        if row["status"] == "ok" and not row["buckets"]:
            raise ValueError("it has no buckets")


def _is_bucket(value: Any) -> bool:
    return (
        isinstance(value, list)
        and [type(n) for n in value[:3]] == [int, int, int]
        and len(value) == 4
        and type(value[3]) in _NUMBER
        and value[2] > 0
    )
