"""What the tasks call right is right: found again from the text of the prompt alone."""

from __future__ import annotations

import json
import re
from collections import Counter, deque
from collections.abc import Callable
from difflib import SequenceMatcher
from pathlib import Path

import pytest

from rwkvx_evals.long.haystack import Haystack
from rwkvx_evals.long.sources import babi
from rwkvx_evals.long.task import Sample
from rwkvx_evals.long.tasks import TASKS
from rwkvx_evals.long.tasks.graphwalks import Graph
from rwkvx_evals.long.writer import Writer

MakeWriter = Callable[..., Writer]
COUNT = 6


def samples(writer: Writer, name: str, length: int = 5000) -> list[Sample]:
    return [TASKS[name].sample(writer, length, index) for index in range(COUNT)]


@pytest.mark.parametrize("name", ["passkey", "passkey_book"])
def test_passkey(shared: MakeWriter, name: str) -> None:
    for sample in samples(shared(), name):
        key = re.search(
            r"\nThe pass key is (\d+)\. Remember it\. \1 is the pass key\.\n", sample.text
        )
        assert key is not None
        assert (key[1],) == sample.answers
        depth = sample.text.index("\nThe pass key is") / len(sample.text)
        assert abs(depth - sample.about["depth"]) < 0.05


@pytest.mark.parametrize("name", [name for name in TASKS if name.startswith("niah")])
def test_needles(shared: MakeWriter, name: str) -> None:
    for sample in samples(shared(), name):
        found = re.findall(r"special magic \w+ for ([\w' -]+) is: ([\w-]+)\.", sample.text)
        query = re.search(r"magic \w+ for (.*) mentioned in the provided text\?", sample.text)
        assert query is not None
        keys = re.split(r", and |, ", query[1])
        right = {value for k, value in found if k in keys}
        assert right == set(sample.answers)
        several = name in ("niah_multivalue", "niah_multiquery")
        assert len(sample.answers) == len(right) == (4 if several else 1)
        if name == "niah_multikey_1":
            assert len(found) == 4


def test_variable_tracking(shared: MakeWriter) -> None:
    for sample in samples(shared(), "ruler_vt"):
        text, question = sample.text.rsplit("\nQuestion: ", 1)
        value = re.search(r"assigned the value (\d+) in", question)
        assert value is not None
        values: dict[str, str] = {}
        for name, right in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text):
            values[name] = values.get(right, right)
        assert [name for name, v in values.items() if v == value[1]] == list(sample.answers)
        assert f"{len(sample.answers)} variables are" in question


def test_common_words(shared: MakeWriter) -> None:
    for length, often in ((1500, (6, 1)), (8000, (30, 3))):
        for sample in samples(shared(), "ruler_cwe", length):
            text = sample.text.split("appear most often.\n")[1].split("\nQuestion")[0]
            listed = re.findall(r"(\d+)\. ([^\d]+?)(?= \d+\.| The|[.!]|$)", text)
            assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))
            counted = Counter(word for _, word in listed)
            assert {word for word, n in counted.items() if n == often[0]} == set(sample.answers)
            assert len(sample.answers) == 10
            rest = {n for word, n in counted.items() if word not in sample.answers}
            # The last entry runs into the words that make the count exact.
            assert rest <= {often[1], often[1] - 1}


def test_frequent_words(shared: MakeWriter) -> None:
    for sample in samples(shared(), "ruler_fwe"):
        text = sample.text.split("frequently appeared coded words. ")[1].split("\nQuestion")[0]
        (dots, _), *most = Counter(text.split()).most_common(4)
        assert dots == "..."
        assert tuple(word for word, _ in most) == sample.answers
        assert len({count for _, count in most}) == 3  # no ties


def test_documents(shared: MakeWriter, data: Path) -> None:
    known = {(s.facts, s.question): s.answer for number in range(1, 21) for s in babi(data, number)}
    for sample in samples(shared(), "ruler_qa"):
        question = re.search(r"Question: In the document about (.*?): (.*) Answer:$", sample.text)
        assert question is not None
        story = re.findall(rf"Document \d+:\n{re.escape(question[1])}\n(.*)", sample.text)
        assert len(story) == 1
        facts = tuple(f"{fact}." for fact in story[0].removesuffix(".").split(". "))
        assert (known[facts, question[2]],) == sample.answers


@pytest.mark.parametrize("name", ["babilong_qa1", "babilong_qa20"])
def test_babilong(shared: MakeWriter, data: Path, name: str) -> None:
    made, stories = shared(), {s.facts: s for s in babi(data, int(name.split("qa")[1]))}
    for sample in samples(made, name):
        context = sample.text.split("\n\n")[-1].split("\n")[0]
        question = sample.text.rsplit("\n", 1)[1]
        facts = tuple(re.findall(r"(?:^|(?<= ))(\w+ went to the \w+\.)", context))
        assert stories[facts].question == question
        assert (stories[facts].answer,) == sample.answers
        assert len(sample.about["depths"]) == len(stories[facts].support)
    # The same questions at every length.
    again = [s.answers for s in samples(made, name, 3000)]
    assert again == [s.answers for s in samples(made, name)]


def test_key_values(shared: MakeWriter) -> None:
    made = shared()
    for sample in samples(made, "kv_retrieval"):
        shown, question = sample.text.split("JSON data:\n")[1].split('\n\nKey: "')
        records = json.loads(shown[: shown.index("}") + 1])
        assert len(records) > 20
        assert (records[question.split('"')[0]],) == sample.answers
    assert len({s.answers for s in samples(made, "kv_retrieval")}) == COUNT


@pytest.mark.parametrize("name", ["graphwalks_bfs", "graphwalks_parents"])
def test_graphs(shared: MakeWriter, name: str) -> None:
    for sample in samples(shared(), name):
        listed = sample.text.split("the following edges:\n")[2].split("\n\nOperation:\n")
        edges = re.findall(r"^(\w{10}) -> (\w{10})$", listed[0], re.MULTILINE)
        assert len(edges) > 50
        if name == "graphwalks_parents":
            one = re.search(r"parents of node (\w+)\.", listed[1])
            assert one is not None
            right = {start for start, end in edges if end == one[1] and start != one[1]}
        else:
            asked = re.search(r"BFS from node (\w+) with depth (\d)\.", listed[1])
            assert asked is not None
            right = reached(edges, asked[1], int(asked[2]))
        assert right == set(sample.answers)
        assert TASKS[name].score("Final Answer: [" + ",".join(right) + "]", sample) == 1.0
        if len(right) > 1:
            part = TASKS[name].score("[" + ",".join(sorted(right)[1:]) + "]", sample)
            assert 0 < part < 1


def test_walks_that_come_back(shared: MakeWriter) -> None:
    edges = [("a", "b"), ("b", "c"), ("c", "a"), ("c", "d"), ("a", "c"), ("d", "d"), ("d", "e")]
    lines = iter([f"{start} -> {end}\n" for start, end in edges])
    hay = Haystack("ring", lines, shared("bytes").encode, after="\n")
    hay.reach(7 * 7)
    graph = Graph(hay, len(hay))
    for depth in range(5):
        assert graph.at_depth("a", depth) == reached(edges, "a", depth)
    assert graph.at_depth("a", 1) == {"b", "c"}  # c is no deeper, a is where it began
    assert graph.at_depth("a", 2) == {"d"}


def reached(edges: list[tuple[str, str]], start: str, depth: int) -> set[str]:
    distance, queue = {start: 0}, deque([start])
    while queue:
        node = queue.popleft()
        for one, end in edges:
            if one == node and end not in distance:
                distance[end] = distance[node] + 1
                queue.append(end)
    return {node for node, steps in distance.items() if steps == depth}


@pytest.mark.parametrize("needles", [2, 4, 8])
def test_co_reference(shared: MakeWriter, needles: int) -> None:
    task = TASKS[f"mrcr_{needles}"]
    for sample in samples(shared(), task.name):
        *turns, last = sample.text.split("User: ")[1:]
        asked = re.match(
            r"Prepend (\w{10}) to the (\d)\w\w \(1 indexed\) (.*) about (\w+)\. Do", last
        )
        assert asked is not None
        prefix, which, kind, topic = asked.groups()
        answers = [
            turn.split("Assistant: ")[1].split("\n\n")[0]
            for turn in turns
            if re.match(rf"Write an? {kind} about {topic}\n\nAssistant: ", turn)
        ]
        assert len(answers) == needles
        right = answers[int(which) - 1]
        assert sample.answers == (prefix + right,)
        # Others of the topic, and of the kind, are about.
        assert any(f" about {topic}\n" in t and f" {kind} " not in t.split("\n")[0] for t in turns)
        assert task.score(f" {prefix}{right}", sample) == 1.0
        assert task.score(right, sample) == 0.0
        half = right[: len(right) // 2]
        expected = SequenceMatcher(None, half, right).ratio()
        assert task.score(prefix + half, sample) == expected < 1


def test_number_string(shared: MakeWriter) -> None:
    for sample in samples(shared(), "number_string"):
        key = re.search(r"\nThe sequence of digits is (\d{10})\. Remember it\. \1 is", sample.text)
        assert key is not None
        assert (key[1],) == sample.answers
        assert TASKS["number_string"].score(f" {key[1]}. Remember", sample) == 1.0
        assert TASKS["number_string"].score(f" 1{key[1]}", sample) == 0.0


@pytest.mark.parametrize(("name", "rank"), [("find_smallest", 1), ("find_second", 2)])
def test_smallest_numbers(shared: MakeWriter, name: str, rank: int) -> None:
    for sample in samples(shared(), name):
        numbers = json.loads(sample.text[sample.text.index("[") : sample.text.index("]") + 1])
        assert len(numbers) > 1000
        right = sorted(set(numbers))[rank - 1]
        assert sample.answers == (str(right),)
        assert numbers.count(right) == 1
        assert abs(numbers.index(right) / len(numbers) - sample.about["depth"]) < 0.01
