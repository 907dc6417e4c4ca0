"""Log-likelihood requests, and the batches that answer them with the least reading.

A *unit* is a prefix that is read once and the branches that continue it. Units are batched only
with units whose prefix has as many tokens, so that no prefix is ever padded; the branches are
padded on the right, which a causal model cannot see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Ids = tuple[int, ...]

# Prefixes of single requests end at a multiple of this many tokens, to make large batches.
QUANTUM = 64
# A batch reads at most so many prefix tokens, all rows together.
BATCH_TOKENS = 65_536


@dataclass(frozen=True)
class Request:
    """Score `continuation` after `context`; both are non-empty token ids."""

    context: Ids
    continuation: Ids


@dataclass(frozen=True)
class Branch:
    """One request below a prefix.

    index: which request. tail: what is fed after the prefix. targets: the tokens to score; the
    first is predicted by the prefix's last logits when `from_prefix`, the last `len(targets)`
    (or all but that first) are predicted by the tail's last positions.
    """

    index: int
    tail: Ids
    targets: Ids
    from_prefix: bool


@dataclass(frozen=True)
class Unit:
    """A prefix, read once, and its branches."""

    prefix: Ids
    branches: tuple[Branch, ...]

    @property
    def tokens(self) -> int:
        """Tokens fed for this unit, without padding."""
        return len(self.prefix) + sum(len(branch.tail) for branch in self.branches)


def make_units(requests: Sequence[Request]) -> list[Unit]:
    """Groups requests by context: each shared context becomes the prefix of one unit."""
    by_context: dict[Ids, list[int]] = {}
    for index, request in enumerate(requests):
        by_context.setdefault(request.context, []).append(index)
    units = []
    for context, indices in by_context.items():
        continuations = [requests[index].continuation for index in indices]
        if len(indices) > 1:
            branches = tuple(
                Branch(index, continuation[:-1], continuation, True)
                for index, continuation in zip(indices, continuations, strict=True)
            )
            units.append(Unit(context, branches))
            continue
        # The context's last token stays in the tail, as its logits score the first target.
        cut = (len(context) - 1) // QUANTUM * QUANTUM
        tail = context[cut:] + continuations[0][:-1]
        units.append(Unit(context[:cut], (Branch(indices[0], tail, continuations[0], False),)))
    return units


def make_batches(units: Sequence[Unit], rows: int) -> list[list[Unit]]:
    """Batches of at most `rows` units with prefixes of equal length, the longest first.

    Depends on the requests alone, never on what is already answered, so that a resumed run
    computes the same batches with the same rounding.
    """
    kinds: dict[tuple[int, bool], list[Unit]] = {}
    for unit in units:
        kinds.setdefault((len(unit.prefix), unit.branches[0].from_prefix), []).append(unit)
    batches: list[list[Unit]] = []
    for (length, _), group in sorted(kinds.items(), reverse=True):
        group.sort(key=_longest_tail)
        size = max(1, min(rows, BATCH_TOKENS // max(length, 1)))
        batch: list[Unit] = []
        for unit in group:
            # Sorted by tail, so this unit's tail is what all rows would be padded to.
            if len(batch) == size or (len(batch) + 1) * _longest_tail(unit) > BATCH_TOKENS:
                batches += [batch] if batch else []
                batch = []
            batch.append(unit)
        batches.append(batch)
    return batches


def _longest_tail(unit: Unit) -> int:
    return max(len(branch.tail) for branch in unit.branches)


def truncate(context: Ids, room: int, how: str) -> Ids:
    """The last `room` tokens of a context ("left"), or its first and last halves ("middle")."""
    if len(context) <= room:
        return context
    if how == "left":
        return context[len(context) - room :]
    head = room // 2
    return context[:head] + context[len(context) - (room - head) :]


def request_bytes(request: Request) -> bytes:
    """A request as bytes, for hashing."""
    context = np.asarray(request.context, dtype=np.int64)
    continuation = np.asarray(request.continuation, dtype=np.int64)
    return len(context).to_bytes(8, "little") + context.tobytes() + continuation.tobytes()
