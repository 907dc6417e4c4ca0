"""The rows of a run's journal: answers of samples, losses of windows, costs of units."""

from __future__ import annotations

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
    fields = FIELDS.get(kind) if isinstance(kind, str) else None
    if fields is None:
        raise ValueError("it is of no known kind")
    for name, types in fields.items():
        if type(row.get(name)) not in types:
            raise ValueError(f"its {name} is missing or of another kind")
    if kind != "unit" and row["status"] not in STATUSES:
        raise ValueError(f"its status is none of {', '.join(STATUSES)}")
    if kind == "sample" and not 0 <= row["score"] <= 1:
        raise ValueError("its score is not between 0 and 1")
