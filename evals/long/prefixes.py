"""Which prompts begin alike, found in the tokens themselves: what they share is read once.

No task says what its samples share. Every prompt is reduced to hashes of its prefixes, one for
each multiple of QUANTUM tokens; two prompts share what their hashes share. The hashes of a million
tokens take 128 KiB, so prompts need not be kept for this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from rwkvx_evals.long.task import Ids

QUANTUM = 64
# What is shared is read apart only where that saves this share of a prompt: each branch costs a
# copy of the state, and prompts that branch together are read as one batch.
WORTHWHILE = 32

Hashes = NDArray[np.uint64]


@dataclass
class Node:
    """A prefix of `depth` tokens.

    leaves: the prompts that are read from here to their ends. children: longer prefixes.
    """

    depth: int
    leaves: list[str] = field(default_factory=list)
    children: list[Node] = field(default_factory=list)

    def members(self) -> list[str]:
        """Every prompt that begins with this prefix."""
        return [*self.leaves, *(m for child in self.children for m in child.members())]

    def tokens(self, lengths: Mapping[str, int], start: int = 0) -> int:
        """Prompt tokens to read for all members, when `start` of them are read already."""
        tails = sum(lengths[leaf] - self.depth for leaf in self.leaves)
        below = sum(child.tokens(lengths, self.depth) for child in self.children)
        return self.depth - start + tails + below


def prefix_hashes(ids: Ids) -> Hashes:
    """Hash of the first QUANTUM, 2·QUANTUM, ... tokens, uint64 [T // QUANTUM].

    Each token is mixed with its place (the finaliser of splitmix64) and the results are summed, so
    that two prefixes of equal hashes are equal but for one case in 2^64. At least one token stays
    beyond the last hash: the logits that begin an answer come from reading it.
    """
    count = max(0, len(ids) - 1) // QUANTUM * QUANTUM
    x = ids[:count].astype(np.uint64) * np.uint64(0xD1342543DE82EF95)
    x += np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return np.cumsum(x.reshape(-1, QUANTUM).sum(axis=1, dtype=np.uint64), dtype=np.uint64)


def common(a: Hashes, b: Hashes) -> int:
    """Tokens that two prompts share at their beginning, in whole quanta."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return QUANTUM * (int(different[0]) if len(different) else n)


def prefix_tree(hashes: Mapping[str, Hashes], length: int, longest_tail: int | None = None) -> Node:
    """The tree of all prompts of about `length` tokens; the root is the empty prefix.

    longest_tail: prompts that leave more than so many tokens behind a prefix do not share it.
    """
    # Big-endian bytes sort as the hashes do, and so bring together what begins alike.
    names = sorted(hashes, key=lambda name: (hashes[name].astype(">u8").tobytes(), name))
    shared = [common(hashes[a], hashes[b]) for a, b in pairwise(names)]
    if longest_tail is not None:
        longest = [QUANTUM * (len(hashes[name]) + 1) for name in names]
        shared = [
            s if max(longest[i], longest[i + 1]) - s <= longest_tail else 0
            for i, s in enumerate(shared)
        ]
    return _subtree(names, shared, 0, max(QUANTUM, length // WORTHWHILE))


def _subtree(names: Sequence[str], shared: Sequence[int], depth: int, gain: int) -> Node:
    """names: sorted; shared: tokens that each shares with the next, all at least `depth`."""
    node = Node(depth)
    start = 0
    for i in range(len(names)):
        if i < len(shared) and shared[i] >= depth + gain:
            continue
        group, between = names[start : i + 1], shared[start:i]
        if between:
            node.children.append(_subtree(group, between, min(between), gain))
        else:
            node.leaves += group
        start = i + 1
    return node
