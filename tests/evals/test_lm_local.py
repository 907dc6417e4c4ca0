"""The data folder under the hub's names, read by lm-eval's own definitions."""

from __future__ import annotations

import bz2
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from rwkvx.data.folder import data_folder
from rwkvx.errors import InputError

pytest.importorskip("lm_eval")

from rwkvx_evals.lm.harness import quiet_lm_eval, templates_compiled_once
from rwkvx_evals.lm.local import DATA_SETS, find_data_set
from rwkvx_evals.lm.tasks import MissingDataError, load_tasks

# Items of the real folder, by lm-eval's names.
ITEMS = {
    "lambada_openai": 5153, "piqa": 1838, "hellaswag": 10042, "winogrande": 1267,
    "arc_easy": 2376, "arc_challenge": 1172, "boolq": 3270, "copa": 100, "openbookqa": 500,
    "wsc273": 273, "wikitext": 62, "mmlu_abstract_algebra": 100, "siqa_foundry": 1954,
    "csqa_foundry": 1221,
}  # fmt: skip


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    path = folder / "llm_foundry_eval" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a few items of every data set, whose rendered form is known."""
    root = tmp_path / "data"
    write(root, "arc_easy", [
        {"query": f"Question: What is {n}?", "choices": ["a", "b", "a", f"c{n}"], "gold": 3}
        for n in range(6)
    ])  # fmt: skip
    write(root, "boolq", [
        {"query": f"Passage: All {n}.\nQuestion: it?\nQuestion: is it {n}?",
         "choices": ["no", "yes"], "gold": n % 2} for n in range(3)
    ])  # fmt: skip
    write(root, "copa", [
        {"query": "The man fell, hard, because", "choices": ["he slept.", "it rained."], "gold": 1},
        {"query": "I ran, therefore", "choices": ["i won.", "i lost."], "gold": 0},
    ])  # fmt: skip
    write(root, "winogrande", [
        {"context_options": ["Sam told Sara that Sam", "Sam told Sara that Sara"],
         "continuation": "was late.", "gold": 1},
        {"context_options": ["He saw the bed", "He saw the bed frame"],
         "continuation": "and sat.", "gold": 0},
    ])  # fmt: skip
    write(root, "winograd_wsc", [
        {"context_options": ["It fits, as the box", "It fits, as the lid"],
         "continuation": "is large.", "gold": 0},
        {"context_options": ["Who? The box", "Who? The lid"], "continuation": ".", "gold": 1},
    ])  # fmt: skip
    (root / "hellaswag").mkdir()
    item = "Roof: A man. he\n{}\nis a\nis [b] b\nis  c\nis d\n"
    text = "".join(item.format(n % 4) for n in range(5))
    (root / "hellaswag" / "hellaswag_val_full.txt.bz2").write_bytes(bz2.compress(text.encode()))
    (root / "wikitext2_raw_test").mkdir()
    pages = " = One = \r\n Text , of one . \r\n = = Part = = \r\n More \r\n = Two = \r\n Last \r\n"
    (root / "wikitext2_raw_test" / "wiki.test.raw").write_bytes(pages.encode())
    write_mmlu(root / "mmlu", tmp_path / "csv", "anatomy")
    return root


def write_mmlu(target: Path, scratch: Path, subject: str) -> None:
    scratch.mkdir()
    target.mkdir()
    with tarfile.open(target / "mmlu.tar.xz", "w:xz") as archive:
        for split, rows in (("dev", 5), ("test", 3)):
            file = scratch / f"{subject}_{split}.csv"
            lines = [f'"{split}, {n}?",0,"one, two",2,3,{n % 4}' for n in range(rows)]
            header = "question,choice0,choice1,choice2,choice3,answer"
            file.write_text("\n".join([header, *lines]) + "\n")
            archive.add(file, f"mmlu/{split}/{file.name}")


def load(names: list[str], folder: Path | None) -> dict[str, Any]:
    with quiet_lm_eval():
        loaded = load_tasks(names, folder)
    return {task.task_name: task for task in loaded.tasks}


def prompts(task: Any) -> list[tuple[Any, list[str]]]:
    """Contexts and scored texts of every item, as lm-eval builds them."""
    with quiet_lm_eval():
        task.build_all_requests()
    by_item: dict[int, list[Any]] = {}
    for instance in task.instances:
        by_item.setdefault(instance.doc_id, []).append(instance.args)
    return [([a[0] for a in args], [a[1] for a in args]) for args in by_item.values()]


def test_rendered_items_give_lm_evals_prompts_back(folder: Path) -> None:
    names = ["arc_easy", "boolq", "copa", "winogrande", "wsc273", "hellaswag"]
    tasks = load(names, folder)
    contexts, texts = prompts(tasks["arc_easy"])[1]
    assert contexts[0] == "Question: What is 1?\nAnswer:"
    assert texts == [" a", " b", " c1"]  # a choice that stands there twice is one of the hub's
    assert tasks["arc_easy"].doc_to_target(tasks["arc_easy"].test_docs()[1]) == 2
    contexts, texts = prompts(tasks["boolq"])[1]
    assert contexts[0] == "All 1.\nQuestion: it?\nQuestion: is it 1?\nAnswer:"
    assert texts == [" no", " yes"]
    (first, _), (second, _) = prompts(tasks["copa"])
    assert (first[0], second[0]) == ("The man fell, hard because", "I ran therefore")
    (first, texts), (second, _) = prompts(tasks["winogrande"])
    assert first == ["Sam told Sara that Sam", "Sam told Sara that Sara"]
    assert texts == [" was late."] * 2
    assert second == ["He saw the bed", "He saw the bed frame"]
    assert [tasks["winogrande"].doc_to_text(d) for d in tasks["winogrande"].eval_docs] == [1, 0]
    (first, texts), (second, ends) = prompts(tasks["wsc273"])
    assert first == ["It fits, as the box", "It fits, as the lid"]
    assert texts[0].strip() == "is large."
    assert second == ["Who? The box", "Who? The lid"]
    assert ends[0].strip() == "."
    contexts, texts = prompts(tasks["hellaswag"])[0]
    assert contexts[0] == "Roof: A man. he"
    assert texts == [" is a", " is b", " is c", " is d"]


def test_pages_and_subjects(folder: Path) -> None:
    tasks = load(["wikitext", "mmlu_anatomy"], folder)
    assert [doc["page"] for doc in tasks["wikitext"].test_docs()] == [
        " = One = \n Text , of one . \n = = Part = = \n More \n", " = Two = \n Last \n"
    ]  # fmt: skip
    task = tasks["mmlu_anatomy"]
    contexts, texts = prompts(task)[1]
    assert contexts[0].endswith("test, 1?\nA. 0\nB. one, two\nC. 2\nD. 3\nAnswer:")
    assert texts == [" A", " B", " C", " D"]
    task.set_config("num_fewshot", 2)
    contexts, _ = prompts(task)[1]
    assert contexts[0].count("dev, ") == 2
    assert "dev, 1?\nA. 0\nB. one, two\nC. 2\nD. 3\nAnswer: B" in contexts[0]


@pytest.mark.parametrize("name", ["arc_easy", "boolq", "hellaswag", "winogrande"])
def test_few_shot_examples_are_never_the_item_itself(folder: Path, name: str) -> None:
    """Without a training split they are other evaluated items, ARC's test items among them."""
    if name == "hellaswag":
        lines = [f"Roof: A man {n}.\n{n % 4}\na\nb\nc\nd\n" for n in range(5)]
        path = folder / "hellaswag" / "hellaswag_val_full.txt.bz2"
        path.write_bytes(bz2.compress("".join(lines).encode()))
    task = load([name], folder)[name]
    items = len(task.eval_docs)
    for seed in range(6):
        task.set_config("num_fewshot", items - 1)
        task.set_fewshot_seed(seed)
        for number, (contexts, _) in enumerate(prompts(task)):
            question = task.doc_to_text(task.eval_docs[number])
            if isinstance(question, int):
                question = task.doc_to_choice(task.eval_docs[number])[question]
                assert contexts[question == contexts[1]].count(question) <= 1
            else:
                assert contexts[0].count(question) == 1


def test_the_output_says_where_data_come_from(folder: Path) -> None:
    with quiet_lm_eval():
        sources = load_tasks(["boolq", "hellaswag", "siqa_foundry"], make_siqa(folder)).sources
    assert sources.by_task["boolq"] == f"folder {folder} (llm_foundry_eval/boolq.jsonl)"
    assert set(sources.notes) == {"hellaswag", "siqa_foundry"}
    assert sources.own_items == {"boolq", "hellaswag"}


def make_siqa(folder: Path) -> Path:
    write(folder, "siqa", [{"query": "Q\nAnswer:", "choices": ["A", "B"], "gold": 1}] * 2)
    return folder


def test_a_split_that_is_not_there_comes_from_the_hub(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The folder has ARC's test split: a definition that evaluates another must not get it."""
    asked = []

    def hub(path: str, name: str, **_: Any) -> None:
        asked.append((path, name))
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr("datasets.load_dataset", hub)
    own = tmp_path / "own.yaml"
    own.write_text(
        "task: arc_validation\ndataset_path: allenai/ai2_arc\ndataset_name: ARC-Easy\n"
        "output_type: multiple_choice\nvalidation_split: validation\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices.text}}"\n'
        'doc_to_target: "{{choices.label.index(answerKey)}}"\n'
    )
    with pytest.raises(MissingDataError, match="no data for task arc_validation"):
        load([str(own)], folder)
    assert asked == [("allenai/ai2_arc", "ARC-Easy")]


DAMAGE = [
    ("llm_foundry_eval/boolq.jsonl", b"{", "boolq"),
    ("llm_foundry_eval/boolq.jsonl", b"[" * 100_000, "boolq"),
    ("llm_foundry_eval/boolq.jsonl", b'{"query": 3, "gold": 1}\n', "boolq"),
    ("llm_foundry_eval/boolq.jsonl", b"\xff\xfe\n", "boolq"),
    ("llm_foundry_eval/copa.jsonl", b'{"query": "a, so", "choices": ["b", "c"]}', "copa"),
    ("llm_foundry_eval/arc_easy.jsonl", b'{"query": "q", "choices": ["b"], "gold": 4}', "arc_easy"),
    ("llm_foundry_eval/winogrande.jsonl", b'{"context_options": ["a"]}', "winogrande"),
    ("llm_foundry_eval/winograd_wsc.jsonl", b"3\n", "wsc273"),
    ("hellaswag/hellaswag_val_full.txt.bz2", b"BZh9nothing", "hellaswag"),
    ("hellaswag/hellaswag_val_full.txt.bz2", bz2.compress(b"a: b\n1\nc\n"), "hellaswag"),
    ("mmlu/mmlu.tar.xz", b"\xfd7zXZ\x00rubbish", "mmlu_anatomy"),
    ("mmlu/mmlu.tar.xz", b"", "mmlu_anatomy"),
]


@pytest.mark.parametrize(("file", "content", "task"), DAMAGE)
def test_damaged_files_are_named_in_one_line(
    folder: Path, file: str, content: bytes, task: str
) -> None:
    """Also in a folder with a long name."""
    folder = folder.rename(folder.with_name("d" * 200))
    (folder / file).write_bytes(content)
    with pytest.raises(InputError, match=r"is damaged|cannot read") as caught:
        load([task], folder)
    message = str(caught.value)
    assert file in message
    assert message.isprintable()
    assert len(message) <= 300


def test_an_archive_without_a_subject(folder: Path) -> None:
    with pytest.raises(InputError, match=r"mmlu.tar.xz is damaged: KeyError 'virology_dev.csv'"):
        load(["mmlu_virology"], folder)


def test_every_data_set_is_named_by_its_files() -> None:
    assert find_data_set("cais/mmlu", "virology") is find_data_set("hails/mmlu_no_train", None)
    assert find_data_set("allenai/ai2_arc", "ARC-Easy") is not None
    assert find_data_set("allenai/ai2_arc", None) is None
    assert find_data_set(None, None) is None
    assert all(data.files for data in DATA_SETS.values())


def real_folder() -> Path:
    folder = data_folder(None)
    if folder is None:
        pytest.skip("RWKVX_DATA is not set")
    return folder


@pytest.mark.parametrize("name", ITEMS)
def test_the_real_data_has_all_items(name: str) -> None:
    task = load([name], real_folder())[name]
    assert len(task.eval_docs) == ITEMS[name]


def test_real_rendered_queries_are_those_of_lm_eval() -> None:
    """Item by item: llm-foundry renders ARC, BoolQ and COPA nearly as lm-eval does."""
    folder = real_folder()
    for name, file, render in (
        ("arc_challenge", "arc_challenge", lambda query: f"{query}\nAnswer:"),
        ("boolq", "boolq", lambda query: f"{query.removeprefix('Passage: ')}\nAnswer:"),
        ("copa", "copa", lambda query: query.replace(", because", " because").replace(
            ", therefore", " therefore")),
        ("openbookqa", "openbook_qa", lambda query: query),
    ):  # fmt: skip
        lines = (folder / "llm_foundry_eval" / f"{file}.jsonl").read_text().splitlines()
        task = load([name], folder)[name]
        with templates_compiled_once():
            for line, doc in zip(lines, task.eval_docs, strict=True):
                row = json.loads(line)
                assert task.doc_to_text(doc) == render(row["query"])
                choices, gold = task.doc_to_choice(doc), task.doc_to_target(doc)
                right = gold.strip() if isinstance(gold, str) else choices[gold]
                assert right == row["choices"][row["gold"]]
                assert [c.strip() for c in choices] == list(dict.fromkeys(row["choices"]))


def test_real_pairs_of_contexts_are_those_of_lm_eval() -> None:
    folder = real_folder()
    for name, file in (("winogrande", "winogrande"), ("wsc273", "winograd_wsc")):
        lines = (folder / "llm_foundry_eval" / f"{file}.jsonl").read_text().splitlines()
        task = load([name], folder)[name]
        for line, doc in zip(lines, task.eval_docs, strict=True):
            row = json.loads(line)
            assert task.doc_to_choice(doc) == row["context_options"]
            assert task.doc_to_target(doc).strip() == row["continuation"]
            assert task.doc_to_text(doc) == row["gold"]
