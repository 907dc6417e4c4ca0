"""How answers are scored; each as the benchmark that is named does it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher


def cleaned(answer: str) -> str:
    """RULER and BABILong: control characters become line breaks, the ends lose white space."""
    return re.sub(r"[\x00-\x1f]", "\n", answer.strip()).strip()


def match_all(answer: str, right: Sequence[str]) -> float:
    """The share of the right answers that occur in the answer, whatever the case (RULER)."""
    text = cleaned(answer).lower()
    return sum(one.lower() in text for one in right) / len(right)


def match_any(answer: str, right: Sequence[str]) -> float:
    """1 where one of the right answers occurs in the answer, whatever the case (RULER's QA)."""
    text = cleaned(answer).lower()
    return float(any(one.lower() in text for one in right))


def first_number(answer: str, right: Sequence[str]) -> float:
    """1 where the first run of digits is a right answer as written (InfiniteBench)."""
    found = re.search(r"[0-9]+", answer)
    return float(found is not None and found[0] in right)


def node_set_f1(answer: str, right: Sequence[str]) -> float:
    """F1 of the set in the last brackets of the answer (GraphWalks); 1 means exactly that set.

    What comes before a last "Final Answer:" does not count; a missing closing bracket is excused.
    """
    lists = re.findall(r"\[([^\[\]]*)(?:\]|$)", answer.rpartition("Final Answer:")[2])
    items = (item.strip().strip("'\"") for item in lists[-1].split(",")) if lists else ()
    given, wanted = {item for item in items if item}, set(right)
    both = len(given & wanted)
    return 2 * both / (len(given) + len(wanted)) if both else 0.0


def similarity(answer: str, right: str, prefix: str) -> float:
    """Ratio of matching characters of what follows `prefix`; 0 without it (OpenAI's MRCR)."""
    answer = answer.lstrip()
    if not answer.startswith(prefix):
        return 0.0
    given, wanted = answer.removeprefix(prefix), right.removeprefix(prefix)
    return SequenceMatcher(None, given, wanted).ratio()
