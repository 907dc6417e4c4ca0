"""Tasks that lm-eval has under the same name: its samples through our templates, and its scores."""

from __future__ import annotations

import gzip
import importlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

datasets = pytest.importorskip("datasets")
wonderwords = pytest.importorskip("wonderwords")
lm_tasks = pytest.importorskip("lm_eval.tasks")
import nltk  # noqa: E402 (lm-eval's own dependency for these tasks)
from lm_eval.tasks._yaml_loader import load_yaml  # noqa: E402

from rwkvx.data.folder import data_folder  # noqa: E402
from rwkvx_evals.long import sources  # noqa: E402
from rwkvx_evals.long.haystack import Haystack, Table  # noqa: E402
from rwkvx_evals.long.sources import NOISE, babi  # noqa: E402
from rwkvx_evals.long.sources import sentences as split  # noqa: E402
from rwkvx_evals.long.task import Sample, Task  # noqa: E402
from rwkvx_evals.long.tasks import (  # noqa: E402
    TASKS,
    ruler_cwe,
    ruler_fwe,
    ruler_vt,
)
from rwkvx_evals.long.writer import Layout, Writer  # noqa: E402

MakeWriter = Callable[..., Writer]
FOLDER = Path(lm_tasks.__file__).parent
NIAH = [name for name in TASKS if name.startswith("niah")]


@pytest.fixture(scope="module", autouse=True)
def offline() -> None:
    """On import lm-eval looks for a sentence splitter, and sorts six million pairs of words."""
    few = {f"{kind}s": sources.words(kind)[::40] for kind in ("noun", "adjective", "verb")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nltk.data, "find", lambda *_: True)
        patch.setattr(wonderwords, "RandomWord", lambda: SimpleNamespace(_categories=few))
        importlib.import_module("lm_eval.tasks.ruler.prepare_niah")


def words(text: str) -> SimpleNamespace:
    """A tokenizer for lm-eval to size its samples with."""
    return SimpleNamespace(input_ids=text.split())


def lm_task(name: str, rows: list[dict[str, Any]], split: str = "test") -> Any:
    """lm-eval's own task with these samples."""
    folder = "babilong" if name.startswith("babilong") else "ruler"
    config = load_yaml(FOLDER / folder / f"{name.removeprefix('ruler_')}.yaml") | {
        "custom_dataset": lambda **_: {split: datasets.Dataset.from_list(rows)}
    }
    manager = lm_tasks.TaskManager(include_defaults=False)
    return manager.load([config])["tasks"][name]


def prompts(task: Any) -> list[str]:
    """What lm-eval sends to a model."""
    task.build_all_requests(rank=0, world_size=1)
    return [instance.args[0] for instance in task.instances]


def written(writer: Writer, task: Task, layout: Layout, text: str) -> Sample:
    """Our prompt of a layout, in the length of lm-eval's."""
    length = len(writer.encode(text)) + task.answer_tokens
    return writer.sample(task, length, 0, layout, [])


def haystack(writer: Writer, units: list[str], before: str = "", after: str = "") -> Haystack:
    hay = Haystack("lm-eval's", iter(units), writer.encode, before=before, after=after)
    hay.reach(len(writer.encode("".join(units))))
    assert len(hay) == len(units)
    return hay


def assert_same_scores(task: Task, ours: Sample, theirs: Any, row: dict[str, Any]) -> None:
    """Score of answers with all, some or none of what is right, in any dress."""
    rng, right = np.random.default_rng(3), list(ours.answers)
    for _ in range(20):
        some = [word for word in right if rng.random() < 0.6]
        answer = rng.choice([" ", "\n", ", ", "\t- "]).join([*some, "else"])
        answer = answer.upper() if rng.random() < 0.3 else answer
        [score] = [s for s in theirs.process_results(row, [answer]).values() if s != -1]
        assert task.score(answer, ours) == pytest.approx(score)


@pytest.mark.parametrize("name", NIAH)
@pytest.mark.parametrize("seed", [1, 2])
def test_needles(shared: MakeWriter, name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks.ruler import niah_utils, prepare_niah

    made, task = shared("bytes"), TASKS[name]
    kind = {"noise": "repeat", "book": "essay", "needles": "needle"}[task.haystack]
    book = " ".join(f"It rained on day {n} of the year." for n in range(400))
    monkeypatch.setattr(prepare_niah, "cached_sent_tokenize", lambda text: list(split(text)))
    monkeypatch.setattr(random, "randint", random.Random(seed).randint)
    random.seed(seed)
    [row] = prepare_niah.generate_samples(
        book.split() if kind == "essay" else prepare_niah.get_haystack(kind),
        TOKENIZER=words, max_seq_length=1500, template=niah_utils.TEMPLATE, num_samples=1,
        type_haystack=kind, type_needle_k=task.keys, type_needle_v=task.values,
        num_needle_k=task.shown, num_needle_v=task.each, num_needle_q=task.asked,
    )  # fmt: skip
    theirs = lm_task(name, [row])
    [text] = prompts(theirs)

    query = re.search(r"magic \w+ for (.*) mentioned in the provided text\?", text)
    assert query is not None
    queries = re.split(r", and |, ", query[1])
    context = text.split("afterwards.\n", 1)[1].rsplit("\nWhat ", 1)[0]
    before, after = (" ", "") if kind == "essay" else ("", "\n")
    units, hidden = [], []
    for unit in split(context) if kind == "essay" else context.split("\n"):
        found = re.fullmatch(r"One of the special magic \w+ for (.+) is: (.+)\.", unit)
        if found and (kind != "needle" or found[1] in queries):
            hidden.append((len(units), found[1], found[2]))
        else:
            units.append(before + unit + after)
    hay = haystack(made, units, before, after)
    needles = [(hay.size(at) / hay.tokens, key, value) for at, key, value in hidden]
    assert len(needles) == task.shown * task.each
    # Where lm-eval puts a needle before its first sentence, it leaves a space there.
    text = text.replace("afterwards.\n One", "afterwards.\nOne")
    ours = written(made, task, task.layout(hay, needles, queries), text)
    assert ours.text == text
    ours = Sample(ours.id, ours.ids, ours.text, tuple(row["outputs"]))
    assert_same_scores(task, ours, theirs, row)


def test_variable_tracking(shared: MakeWriter) -> None:
    from lm_eval.tasks.ruler import vt_utils

    made, task = shared("bytes"), TASKS["ruler_vt"]
    random.seed(4)
    np.random.seed(4)
    [shown] = vt_utils.sys_vartrack_w_noise_random(words, 1, 300, incremental=5)
    rows = vt_utils.sys_vartrack_w_noise_random(words, 3, 900, icl_example=shown)
    theirs = lm_task("ruler_vt", rows)
    for row, text in zip(rows, prompts(theirs), strict=True):
        example, main = text.split("\n\n\n\n")
        context, end = main.removeprefix(ruler_vt.INTRODUCTION).split("\nQuestion: ")
        units, chain = [], []
        for part in re.findall(r"VAR \w+ = (?:VAR \w+ |\d+)|The grass[^\n]*\n", context + "\n"):
            if part.startswith("VAR"):
                chain.append((len(units), part))
            else:
                units.append(f" {part}")
        assert chain[0][1].split(" = ")[1] in end
        assert [part for _, part in chain] == ruler_vt.chain(row["outputs"], chain[0][1][-5:])
        hay = haystack(made, units, before=" ")
        places = [(hay.size(at) / hay.tokens, part) for at, part in chain]
        layout = task.layout(hay, example + 4 * "\n", places, chain[0][1][-5:])
        assert written(made, task, layout, text).text == text
        ours = Sample("", np.zeros(1, np.int64), "", tuple(row["outputs"]))
        assert_same_scores(task, ours, theirs, row)
    # Our worked example differs in how many lines it has only.
    for shown in (example + 4 * "\n", ruler_vt.example(rows[0]["outputs"], "54321")):
        context, end = shown.removeprefix(ruler_vt.INTRODUCTION).split("\nQuestion: ")
        parts = re.findall(r"VAR \w+ = (?:VAR \w+ |\d+)|The grass[^\n]*\n", context)
        variables = [part[4 : part.index(" =")] for part in parts if part.startswith("VAR")]
        value = next(part for part in parts if part.startswith("VAR"))[-5:]
        answered = f"{ruler_vt.question(value)}  {' '.join(variables)}" + 4 * "\n"
        assert shown == ruler_vt.INTRODUCTION + " ".join(parts) + answered
        assert f"{value} in the text above" in end


@pytest.mark.parametrize("length", [1500, 5000])
def test_common_words(shared: MakeWriter, length: int) -> None:
    from lm_eval.tasks.ruler import cwe_utils

    made, task = shared("bytes"), TASKS["ruler_cwe"]
    random.seed(5)
    rows = cwe_utils.sys_word_pair_random(2, length, tokenizer=words)
    theirs = lm_task("ruler_cwe", rows)
    for row, text in zip(rows, prompts(theirs), strict=True):
        context = text.removeprefix(ruler_cwe.HEAD).removesuffix(ruler_cwe.TAIL)
        listed = re.split(r" ?\d+\. ", context)[1:]
        pieces = [p for n, word in enumerate(listed, 1) for p in (f" {n}.", f" {word}")]
        hay = Table(pieces, made.encode).row("", np.arange(len(pieces)), before=" ")
        assert written(made, task, task.layout(hay), text).text == text
        often, seldom = ruler_cwe.LONG if length >= 4096 else ruler_cwe.SHORT
        assert Counter(Counter(listed).values())[often] == ruler_cwe.COMMON
        assert set(Counter(listed).values()) == {often, seldom}
        ours = Sample("", np.zeros(1, np.int64), "", tuple(row["outputs"]))
        assert_same_scores(task, ours, theirs, row)


def test_frequent_words(shared: MakeWriter) -> None:
    pytest.importorskip("scipy")
    from lm_eval.tasks.ruler import fwe_utils

    made, task = shared("bytes"), TASKS["ruler_fwe"]
    random.seed(6)
    rows = fwe_utils.sys_kwext(words, 3000, num_samples=2)
    theirs = lm_task("ruler_fwe", rows)
    for row, text in zip(rows, prompts(theirs), strict=True):
        listed = text.removeprefix(ruler_fwe.HEAD).removesuffix(ruler_fwe.TAIL).split(" ")
        pieces = [f" {word}" for word in listed]
        hay = Table(pieces, made.encode).row("", np.arange(len(pieces)), before=" ")
        assert written(made, task, task.layout(hay), text).text == text
        seen = [count for _, count in Counter(listed).most_common()]
        total = next(
            n for n in range(len(listed), 2 * len(listed)) if ruler_fwe.counts(n, 60)[0] == seen[0]
        )
        totals = [ruler_fwe.counts(n, 3000 // 50) for n in range(total, total + 3)]
        assert any(seen == [n for n in counts.tolist() if n] for counts in totals)
        ours = Sample("", np.zeros(1, np.int64), "", tuple(row["outputs"]))
        assert_same_scores(task, ours, theirs, row)


@pytest.mark.parametrize("number", range(1, 21))
def test_babilong(shared: MakeWriter, data: Path, number: int) -> None:
    made, task = shared("bytes"), TASKS[f"babilong_qa{number}"]
    story = babi(data, number)[0]
    ours = task.sample(made, 4000, 0)
    [*_, last] = ours.text.split("\n\n")
    context, question = last.split("\n")
    row = {"input": f" {context} ", "question": f"{question} ", "target": ours.answers[0]}
    theirs = lm_task(task.name, [row], f"qa{number}")
    assert prompts(theirs) == [ours.text]
    assert story.question.endswith("?")
    assert_same_scores(task, ours, theirs, row)


def answers(nodes: tuple[str, ...]) -> Iterator[str]:
    yield f"Final Answer: [{', '.join(nodes)}]"
    yield f"It is so.\nFinal Answer: [{nodes[0]}, other]"
    yield "Final Answer: []"
    yield "Final Answer: ['" + "', '".join(nodes[1:]) + "', 'more']\n"
    yield ""


def test_graph_scores(shared: MakeWriter) -> None:
    """Another name and ending, the same F1 of an answer in its format."""
    from lm_eval.tasks.graphwalks.utils import process_results

    made, task = shared(), TASKS["graphwalks_bfs"]
    for index in range(5):
        sample = task.sample(made, 4000, index)
        for answer in answers(sample.answers):
            theirs = process_results({"answer_nodes": list(sample.answers)}, [answer])
            assert task.score(answer, sample) == pytest.approx(theirs["flexible_f1"])


def test_digits_score(shared: MakeWriter) -> None:
    from lm_eval.tasks.infinitebench.utils import process_results_int_match, process_results_math

    made = shared()
    for name, score in (
        ("passkey", process_results_int_match), ("number_string", process_results_int_match),
        ("find_smallest", process_results_math),
    ):  # fmt: skip
        sample = TASKS[name].sample(made, 3000, 0)
        [key] = sample.answers
        for answer in (key, f" is {key}.", f"{key}1", f"no {key} 5", f"5 {key}", "none", ""):
            theirs = score({"answer": [key]}, [answer])["score"]
            assert TASKS[name].score(answer, sample) == theirs


def test_key_values_of_the_published_data(shared: MakeWriter) -> None:
    """The prompt that Lost in the Middle makes of its own records."""
    folder = data_folder(None)
    file = folder / "kv_retrieval" / "kv-retrieval-75_keys.jsonl.gz" if folder else None
    if file is None or not file.is_file():
        pytest.skip("no data folder with kv_retrieval")
    made, task = shared("world"), TASKS["kv_retrieval"]
    with gzip.open(file, "rt") as lines:
        for row in (json.loads(next(lines)) for _ in range(3)):
            records = [f'"{key}": "{value}"' for key, value in row["ordered_kv_records"]]
            text = (
                "Extract the value corresponding to the specified key in the JSON object below.\n"
                "\nJSON data:\n{" + ",\n ".join(records) + f'}}\n\nKey: "{row["key"]}"\n'
                "Corresponding value:"
            )
            hay = haystack(made, [f",\n {record}" for record in records], before=",\n ")
            ours = written(made, task, task.layout(hay, row["key"], len(hay)), text)
            assert ours.text == text
            scored = Sample("", ours.ids, "", (row["value"],))
            assert task.score(f' "{row["value"].upper()}"', scored) == 1.0
            assert task.score(f' "{row["key"]}"', scored) == 0.0


def test_noise_is_rulers() -> None:
    from lm_eval.tasks.ruler import prepare_niah

    assert prepare_niah.get_haystack("repeat") == NOISE
