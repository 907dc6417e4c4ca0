"""GraphWalks: sets of nodes of a graph that is given as a list of edges."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from rwkvx_evals.long.haystack import Haystack
from rwkvx_evals.long.scores import node_set_f1
from rwkvx_evals.long.task import Sample
from rwkvx_evals.long.writer import Layout, Writer

EDGES = 2  # that leave each node
HOPS = 3  # at most
LARGEST = 12  # nodes of an answer
HEAD = (
    "You will be given a graph as a list of directed edges. All nodes are at least degree 1. You "
    "will also get a description of an operation to perform on the graph.\nYour job is to execute "
    "the operation on the graph and return the set of nodes that the operation results in. If "
    "asked for a breadth-first search (BFS), only return the nodes that are both reachable and "
    "exactly at that depth (not nodes at intermediate depths), and do not return the starting "
    "node. If asked for the parents of a node, only return the nodes that have an edge leading to "
    "the given node, do not return the given node itself.\n\nHere is an example:\n<begin example>\n"
    "The graph has the following edges:\nuvwx -> alke\nabcd -> uvwx\nabcd -> efgh\nefgh -> uvwx\n"
    "\nOperation:\nPerform a BFS from node abcd with depth 1.\n\nFinal Answer: [uvwx, efgh]\n\n"
    "Operation:\nFind the parents of node uvwx.\n\nFinal Answer: [abcd, efgh]\n<end example>\n\n"
    "Here is the graph to operate on:\nThe graph has the following edges:\n"
)


def node(number: int) -> str:
    """The name of a node: as in the published graphs, ten digits of a hash of its number."""
    return hashlib.md5(str(number).encode(), usedforsecurity=False).hexdigest()[:10]


class Graph:
    """The edges of the first `units` lines of a haystack, by node."""

    def __init__(self, hay: Haystack, units: int) -> None:
        self.hay, self.units = hay, units
        self.children: dict[str, set[str]] = {}
        self.parents: dict[str, set[str]] = {}
        for line in hay.text(0, units, closes=True).splitlines():
            start, end = line.split(" -> ")
            self.children.setdefault(start, set()).add(end)
            self.parents.setdefault(end, set()).add(start)

    def at_depth(self, start: str, depth: int) -> set[str]:
        """Nodes whose shortest path from `start` has `depth` edges."""
        seen = ring = {start}
        for _ in range(depth):
            ring = set().union(*(self.children.get(one, ()) for one in ring)) - seen
            seen = seen | ring
        return ring


@dataclass(frozen=True)
class GraphWalks:
    """All samples of a length share the graph; each asks for another walk."""

    name: str
    about: str
    source: str = (
        "OpenAI's GraphWalks (MIT), its prompt, node names and F1 (1 is exactly the set); "
        f"{EDGES} edges leave each node and answers have 1 to {LARGEST} nodes, so that they are "
        "short; the prompt ends with 'Final Answer:'"
    )
    answer_tokens: int = 192
    stop: tuple[str, ...] = ("]",)

    def sample(self, writer: Writer, length: int, index: int) -> Sample:
        graph = writer.keep(("graph", length), lambda: self._graph(writer, length))
        rng = writer.rng(self.name, length, index)
        nodes = list(graph.children if self.name == "graphwalks_bfs" else graph.parents)
        while True:
            one, hops = nodes[rng.integers(len(nodes))], int(rng.integers(1, HOPS + 1))
            if self.name == "graphwalks_bfs":
                operation = f"Perform a BFS from node {one} with depth {hops}."
                right, about = graph.at_depth(one, hops), {"hops": hops}
            else:
                operation = f"Find the parents of node {one}."
                right, about = graph.parents[one] - {one}, {}
            if 1 <= len(right) <= LARGEST:
                break
        layout = self._layout(graph.hay, operation, graph.units)
        return writer.sample(self, length, index, layout, sorted(right), nodes=len(right), **about)

    def _layout(self, hay: Haystack, operation: str, units: int | None = None) -> Layout:
        tail = (
            f"\n\nOperation:\n{operation}\n\nYou should immediately return the set of nodes that "
            "the operation results in, with no additional text. Return your final answer as a "
            "list of nodes in the very last line of your response. For example, if the operation "
            "returns the set of nodes [node1, node2, node3], your response should be:\n"
            "Final Answer: [node1, node2, node3]\nIf the operation returns the empty set, your "
            "response should be:\nFinal Answer: []\n\nFinal Answer:"
        )
        return Layout(HEAD, hay, tail, units=units)

    def _graph(self, writer: Writer, length: int) -> Graph:
        """As many nodes as their edges fill the prompt."""
        question = f"Perform a BFS from node {node(0)} with depth {HOPS}."
        rng = writer.rng("graphwalks", length)
        # A few edges over all of the graph tell how many tokens an edge takes.
        some = "".join(islice(_edges(10_000, np.random.default_rng(0)), 200))
        nodes = int(length / len(writer.encode(some)) * 200 / EDGES * 1.1) + 20
        hay = writer.haystack(f"graph of {length}", lambda: _edges(nodes, rng), after="\n")
        units = writer.capacity(self, length, self._layout(hay, question))
        return Graph(hay, units)

    def score(self, answer: str, sample: Sample) -> float:
        return node_set_f1(answer, sample.answers)


def _edges(nodes: int, rng: np.random.Generator) -> Iterator[str]:
    names = [node(number) for number in range(nodes)]
    for name in names:
        for end in rng.choice(nodes, EDGES, replace=False):
            yield f"{name} -> {names[end]}\n"


TASKS = [
    GraphWalks("graphwalks_bfs", "nodes at a distance of up to 3 edges in a listed graph; F1"),
    GraphWalks("graphwalks_parents", "nodes with an edge to a given one in a listed graph; F1"),
]
