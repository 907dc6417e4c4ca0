"""Every task: exact lengths, tokens of the text, answers that score, the same samples again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rwkvx.data.folder import data_folder
from rwkvx.errors import InputError
from rwkvx_evals.long import tasks as package
from rwkvx_evals.long.sources import BABI, LONG_BOOKS, babi
from rwkvx_evals.long.task import Sample, Task
from rwkvx_evals.long.tasks import TASKS, find_tasks
from rwkvx_evals.long.writer import Writer

MakeWriter = Callable[..., Writer]
EXPECTED = {
    "passkey", "passkey_book", "ruler_vt", "ruler_cwe", "ruler_fwe", "ruler_qa", "kv_retrieval",
    "graphwalks_bfs", "graphwalks_parents", "mrcr_2", "mrcr_4", "mrcr_8", "number_string",
    "find_smallest", "find_second", *(f"niah_single_{n}" for n in (1, 2, 3)),
    *(f"niah_multikey_{n}" for n in (1, 2, 3)), "niah_multivalue", "niah_multiquery",
    *(f"babilong_qa{n}" for n in range(1, 21)),
}  # fmt: skip
# One of each family: the others differ in what they ask only.
FAMILIES = sorted(EXPECTED - {f"babilong_qa{n}" for n in range(2, 21)} - {"mrcr_2", "mrcr_4"})


def right_answer(task: Task, sample: Sample) -> str:
    """The right answer as a model would give it."""
    joined = ", ".join(sample.answers)
    return f"[{joined}" if task.name.startswith("graphwalks") else f" {joined}."


def test_all_tasks_are_there() -> None:
    assert set(TASKS) == EXPECTED
    for name, task in TASKS.items():
        assert name == task.name
        assert task.about
        assert "\n" not in task.about + task.source
        # Says what it follows, and how it differs.
        assert any(word in task.source for word in ("arXiv", "MIT"))
        assert any(mark in task.source for mark in (";", ","))
        assert task.answer_tokens > 0


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_lengths_are_exact_and_the_answer_scores(shared: MakeWriter, name: str) -> None:
    task, made = TASKS[name], shared("world")
    for length, count in ((1024, 2), (4096, 2), (9973, 1)):
        samples = [task.sample(made, length, index) for index in range(count)]
        for index, sample in enumerate(samples):
            assert sample.id == f"{name}-{length}-{index}"
            assert len(sample.ids) + task.answer_tokens == length
            assert made.reads_as_written(sample)
            assert made._tokenizer.decode(sample.ids.tolist()) == sample.text
            assert json.loads(json.dumps(sample.about)) == sample.about
            assert len(made.encode(right_answer(task, sample))) <= task.answer_tokens
            assert task.score(right_answer(task, sample), sample) > 0.99
            assert task.score("", sample) == task.score("No idea", sample) == 0.0
        assert len({sample.sha256 for sample in samples}) == count


@pytest.mark.parametrize("kind", ["bytes", "words", "marked", "across"])
@pytest.mark.parametrize("name", FAMILIES)
def test_any_tokenizer(shared: MakeWriter, kind: str, name: str) -> None:
    task, made = TASKS[name], shared(kind)
    sample = task.sample(made, 4099, 1)
    assert len(sample.ids) + task.answer_tokens == 4099
    assert made._tokenizer.decode(sample.ids[len(made.begin) :].tolist()) == sample.text
    # Noise on which this tokenizer was trained has no place where it does not merge.
    assert made.reads_as_written(sample) or (kind == "across" and "passkey" in name)
    assert len(made.encode(right_answer(task, sample))) <= task.answer_tokens


@pytest.mark.parametrize("name", FAMILIES)
def test_no_order_and_no_choice_of_tasks_changes_a_sample(writer: MakeWriter, name: str) -> None:
    task, first, second = TASKS[name], writer(), writer()
    for index in (0, 1):
        task.sample(first, 3000, index)
    hashes = [task.sample(first, length, 2).sha256 for length in (1500, 3000)]
    assert [task.sample(second, length, 2).sha256 for length in (3000, 1500)] == hashes[::-1]
    assert task.sample(writer(seed=1), 3000, 2).sha256 != hashes[1]


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"ruler_cwe", "ruler_fwe"}))
def test_samples_share_their_prefix(shared: MakeWriter, name: str) -> None:
    """Up to the first of what is hidden; the whole context where only the question differs."""
    task, made = TASKS[name], shared()
    first, second = (task.sample(made, 6000, index) for index in (8, 18))
    short = min(len(first.ids), len(second.ids))
    shared = int(np.argmin(np.append(first.ids[:short] == second.ids[:short], False)))
    hidden = [*first.about.get("depths", ()), *second.about.get("depths", ())]
    if name.startswith(("kv", "graph", "ruler_qa")):
        assert shared > 0.85 * short
    elif name.startswith(("passkey", "number", "find_smallest")):
        assert shared > 0.85 * 0.88 * short  # both at the depth of 8/9
    elif name.startswith(("niah", "mrcr")) and hidden:
        assert shared > min(hidden) * 0.8 * short - 400


def test_no_key_is_hidden_twice(writer: MakeWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few words to draw from: the key that is asked for is none of the distractors'."""
    monkeypatch.setattr("rwkvx_evals.long.sources.words", lambda kind: tuple("abcdefghijklmnop"))
    made = writer("bytes")
    for index in range(8):
        sample = TASKS["niah_multikey_2"].sample(made, 4000, index)
        key = sample.text.rsplit(" for ", 1)[1].split(" mentioned")[0]
        assert sample.text.count(f" for {key} is:") == 1


def test_too_short(shared: MakeWriter) -> None:
    made = shared("bytes")
    for name in FAMILIES:
        with pytest.raises(InputError, match=f"{name} needs at least [0-9,]+ tokens"):
            TASKS[name].sample(made, 60, 0)


def test_the_number_named_is_enough(shared: MakeWriter) -> None:
    """Nearly: the questions of other samples may be some tokens longer."""
    for name in FAMILIES:
        made = shared("world")
        with pytest.raises(InputError) as error:
            TASKS[name].sample(made, 20, 0)
        needed = int(str(error.value).split("at least ")[1].split()[0].replace(",", ""))
        TASKS[name].sample(made, needed + 300, 0)


@pytest.mark.parametrize("name", ["niah_single_2", "babilong_qa1", "mrcr_2", "passkey_book"])
def test_no_data(writer: MakeWriter, tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"holds no (books|bAbI)"):
        TASKS[name].sample(writer(data=tmp_path), 4096, 0)


def test_real_data(tokenizers: dict[str, Any]) -> None:
    folder = data_folder(None)
    if folder is None or not (folder / BABI).is_file() or not (folder / LONG_BOOKS).is_dir():
        pytest.skip(f"no data folder with {BABI} and {LONG_BOOKS}")
    made = Writer(tokenizers["world"], data=folder)
    for number in range(1, 21):
        stories = babi(folder, number)
        assert len(stories) >= 900
        assert all(fact < len(story.facts) for story in stories for fact in story.support)
    for name in EXPECTED:
        for length in (1024, 6000):
            sample = TASKS[name].sample(made, length, 0)
            assert len(sample.ids) + TASKS[name].answer_tokens == length
            assert made.reads_as_written(sample)


def test_find_tasks() -> None:
    assert [task.name for task in find_tasks(["passkey", "mrcr_*", "passkey"])] == [
        "passkey", "mrcr_2", "mrcr_4", "mrcr_8",
    ]  # fmt: skip
    assert [task.name for task in find_tasks(["mrcr", "graphwalks", "passkey"])] == [
        "mrcr_2", "mrcr_4", "mrcr_8", "graphwalks_bfs", "graphwalks_parents", "passkey",
    ]  # fmt: skip
    assert [task.name for task in find_tasks(["all"])] == list(TASKS)
    with pytest.raises(InputError, match=r"'niah_singel_1', did you mean niah_single_1"):
        find_tasks(["niah_singel_1"])
    with pytest.raises(InputError, match="unknown task 'zzzz': see --list"):
        find_tasks(["zzzz"])


# ------------------------------------------------------------- a new task


def test_a_new_task_is_one_short_file(
    writer: MakeWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = Path(__file__).with_name("colour.py").read_text()
    assert len(text.splitlines()) <= 60
    (tmp_path / "colour.py").write_text(text)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    task = package._found()["colour"]
    sample = task.sample(writer(), 2000, 5)
    assert len(sample.ids) == 2000 - 8
    assert f"is {sample.answers[0]}." in sample.text
    shutil.copy(tmp_path / "colour.py", tmp_path / "again.py")
    with pytest.raises(ValueError, match="two tasks are named colour"):
        package._found()
