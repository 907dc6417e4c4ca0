"""The data folder under the hub's names: splits with the fields that lm-eval's definitions read.

Files that hold rendered questions are taken apart again; where that does not give back what the
hub has, the note of the data set says how it differs.
"""

from __future__ import annotations

import bz2
import csv
import io
import json
import lzma
import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from rwkvx.errors import InputError
from rwkvx_evals.files import short

Documents = list[dict[str, Any]]
Splits = dict[str, Documents]


# What reading damaged files raises, besides OSError.
_DAMAGE = (
    ValueError, LookupError, TypeError, AttributeError, EOFError, RecursionError,
    tarfile.TarError, lzma.LZMAError, csv.Error,
)  # fmt: skip


@dataclass(frozen=True)
class DataSet:
    """How a data folder holds a data set of the hub.

    files: relative to the folder. read: from the folder and the hub's configuration name to the
    splits that are there. note: how it differs from the hub's.
    """

    files: tuple[str, ...]
    read: Callable[[Path, str], Splits]
    note: str = ""

    def held(self, folder: Path) -> bool:
        """Whether the folder has all of the files."""
        return all((folder / file).is_file() for file in self.files)

    def splits(self, folder: Path, name: str) -> Splits:
        """The splits that are there; raises InputError for files that are damaged."""
        try:
            return self.read(folder, name)
        except OSError as error:
            where = short(error.filename or folder / self.files[-1])
            raise InputError(f"cannot read {where}: {error.strerror or error}") from error
        except _DAMAGE as error:
            what = short(folder / " and ".join(self.files), 150)
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__} "
            raise InputError(f"{what} is damaged: {kind}{str(error)[:100]}") from error


def _text(path: Path, unpack: Callable[[bytes], bytes] = bytes) -> str:
    return unpack(path.read_bytes()).decode("utf-8").replace("\r\n", "\n")


def read_jsonl(path: Path) -> Documents:
    """Rows of a JSON-lines file."""
    return [json.loads(line) for line in _text(path).split("\n") if line.strip()]


def _lambada(folder: Path, _: str) -> Splits:
    return {"test": read_jsonl(folder / "lambada_openai" / "lambada_test.jsonl")}


def _piqa(folder: Path, _: str) -> Splits:
    """The questions and, from a file of their own, the labels that the hub has beside them."""
    rows = read_jsonl(folder / "piqa" / "valid.jsonl")
    labels = [int(line) for line in _text(folder / "piqa" / "valid-labels.lst").split()]
    if len(labels) != len(rows):
        raise ValueError(f"{len(labels)} labels for {len(rows)} questions")
    joined = [row | {"label": label} for row, label in zip(rows, labels, strict=True)]
    return {"validation": joined}


def _hellaswag(folder: Path, _: str) -> Splits:
    """Items of six lines: activity and context, label, four endings."""
    text = _text(folder / "hellaswag" / "hellaswag_val_full.txt.bz2", bz2.decompress)
    lines = text.rstrip("\n").split("\n")
    rows = []
    for start in range(0, len(lines), 6):
        head, label, *endings = lines[start : start + 6]
        activity, colon, context = head.partition(": ")
        if not colon or len(endings) != 4 or label not in ("0", "1", "2", "3"):
            raise ValueError(f"no item of six lines at line {start + 1}")
        # lm-eval capitalises ctx_b; nothing says where it starts in a context that is joined.
        parts = {"activity_label": activity, "ctx_a": context, "ctx_b": ""}
        rows.append({**parts, "label": label, "endings": endings})
    return {"validation": rows}


def _rendered(folder: Path, name: str) -> Documents:
    return read_jsonl(folder / "llm_foundry_eval" / f"{name}.jsonl")


def _lettered(row: dict[str, Any]) -> dict[str, Any]:
    """Choices with letters and the letter of the right one; a repeated choice is one again."""
    texts = list(dict.fromkeys(row["choices"]))
    letters = [chr(ord("A") + number) for number in range(len(texts))]
    right = letters[texts.index(row["choices"][row["gold"]])]
    return {"choices": {"text": texts, "label": letters}, "answerKey": right}


def _arc(name: str) -> Callable[[Path, str], Splits]:
    def read(folder: Path, _: str) -> Splits:
        rows = _rendered(folder, name)
        return {
            "test": [
                {"question": row["query"].removeprefix("Question: "), **_lettered(row)}
                for row in rows
            ]
        }

    return read


def _openbookqa(folder: Path, _: str) -> Splits:
    rows = _rendered(folder, "openbook_qa")
    return {"test": [{"question_stem": row["query"], **_lettered(row)} for row in rows]}


def _boolq(folder: Path, _: str) -> Splits:
    rows = []
    for row in _rendered(folder, "boolq"):
        passage, _, question = row["query"].removeprefix("Passage: ").rpartition("\nQuestion: ")
        parts = {"passage": passage, "question": question.removesuffix("?")}
        rows.append({**parts, "label": row["gold"]})
    return {"validation": rows}


def _copa(folder: Path, _: str) -> Splits:
    rows = []
    for row in _rendered(folder, "copa"):
        premise, _, connector = row["query"].rpartition(", ")
        kind = {"because": "cause", "therefore": "effect"}[connector]
        first, second = row["choices"]
        choices = {"choice1": first, "choice2": second, "label": row["gold"]}
        rows.append({"premise": f"{premise}.", "question": kind, **choices})
    return {"validation": rows}


def _options(row: dict[str, Any]) -> tuple[str, list[str]]:
    """What two contexts share, up to a word's start, and how each goes on."""
    first, second = row["context_options"]
    pairs = enumerate(zip(first, second, strict=False))
    shared = next((at for at, (a, b) in pairs if a != b), min(len(first), len(second)))
    head = first[: first.rfind(" ", 0, shared) + 1]
    return head, [first[len(head) :], second[len(head) :]]


def _winogrande(folder: Path, _: str) -> Splits:
    rows = []
    for row in _rendered(folder, "winogrande"):
        head, (first, second) = _options(row)
        options = {"option1": first, "option2": second, "answer": str(row["gold"] + 1)}
        rows.append({"sentence": f"{head}_ {row['continuation']}", **options})
    return {"validation": rows}


def _wsc273(folder: Path, _: str) -> Splits:
    rows = []
    for row in _rendered(folder, "winograd_wsc"):
        head, options = _options(row)
        end = row["continuation"]
        # The rendered form has put the options in the place of the pronoun: any will do.
        text = f"{head}it{'' if end[:1] in '.,;' else ' '}{end}"
        parts = {"text": text, "pronoun": "it", "pronoun_loc": len(head)}
        rows.append({**parts, "options": options, "label": row["gold"]})
    return {"test": rows}


@lru_cache(maxsize=1)
def _mmlu_files(path: Path) -> dict[str, str]:
    """Text of every CSV in the archive, by name without its folders."""
    with tarfile.open(fileobj=io.BytesIO(path.read_bytes()), mode="r:xz") as archive:
        members = [m for m in archive if m.isfile() and m.name.endswith(".csv")]
        files = {Path(m.name).name: archive.extractfile(m) for m in members}
        return {n: f.read().decode("utf-8") for n, f in files.items() if f is not None}


def _mmlu(folder: Path, subject: str) -> Splits:
    files, splits = _mmlu_files(folder / "mmlu" / "mmlu.tar.xz"), {}
    for split in ("dev", "test"):
        splits[split] = [
            {
                "question": row["question"],
                "subject": subject,
                "choices": [row[f"choice{n}"] for n in range(4)],
                "answer": int(row["answer"]),
            }
            for row in csv.DictReader(io.StringIO(files[f"{subject}_{split}.csv"]))
        ]
    return splits


def _wikitext(folder: Path, _: str) -> Splits:
    """Pages: each starts with a heading of the first level."""
    text = _text(folder / "wikitext2_raw_test" / "wiki.test.raw")
    pages = re.split(r"^(?= = [^=\n](?:[^\n]*[^=\n])? = ?$)", text, flags=re.MULTILINE)
    return {"test": [{"page": page} for page in pages if page.strip()]}


def _foundry(folder: Path, name: str) -> Splits:
    """The rendered questions as they are, for definitions of our own."""
    return {"validation": _rendered(folder, name)}


def _file(name: str) -> tuple[str, ...]:
    return (f"llm_foundry_eval/{name}.jsonl",)


_ARC_NOTE = "from llm-foundry's form: items of five choices have four there"
_MMLU = DataSet(("mmlu/mmlu.tar.xz",), _mmlu)

# By the hub's name and configuration; "*" for any of them.
DATA_SETS: dict[tuple[str, str], DataSet] = {
    ("EleutherAI/lambada_openai", "default"): DataSet(
        ("lambada_openai/lambada_test.jsonl",), _lambada
    ),
    ("baber/piqa", ""): DataSet(("piqa/valid.jsonl", "piqa/valid-labels.lst"), _piqa),
    ("Rowan/hellaswag", ""): DataSet(
        ("hellaswag/hellaswag_val_full.txt.bz2",),
        _hellaswag,
        "the two parts of a context are joined there, so that the second is not capitalised",
    ),
    ("allenai/winogrande", "winogrande_xl"): DataSet(_file("winogrande"), _winogrande),
    ("allenai/ai2_arc", "ARC-Easy"): DataSet(_file("arc_easy"), _arc("arc_easy"), _ARC_NOTE),
    ("allenai/ai2_arc", "ARC-Challenge"): DataSet(
        _file("arc_challenge"), _arc("arc_challenge"), _ARC_NOTE
    ),
    ("aps/super_glue", "boolq"): DataSet(_file("boolq"), _boolq),
    ("aps/super_glue", "copa"): DataSet(_file("copa"), _copa),
    ("allenai/openbookqa", "main"): DataSet(_file("openbook_qa"), _openbookqa),
    ("lighteval/winograd_wsc", "wsc273"): DataSet(_file("winograd_wsc"), _wsc273),
    ("cais/mmlu", "*"): _MMLU,
    ("hails/mmlu_no_train", "*"): _MMLU,
    ("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1"): DataSet(
        ("wikitext2_raw_test/wiki.test.raw",),
        _wikitext,
        "blank lines are missing there, so that texts are a little shorter than the hub's",
    ),
    ("llm_foundry_eval", "siqa"): DataSet(
        _file("siqa"),
        _foundry,
        "llm-foundry's questions, with two of three answers: not social_iqa",
    ),
    ("llm_foundry_eval", "commonsense_qa"): DataSet(
        _file("commonsense_qa"),
        _foundry,
        "llm-foundry's questions, with four of five answers: not commonsense_qa",
    ),
}


# Tasks of lm-eval whose data llm-foundry has in a form of its own: our definitions of it.
FOUNDRY = {"lighteval/siqa": "siqa_foundry", "tau/commonsense_qa": "csqa_foundry"}


def find_data_set(path: str | None, name: str | None) -> DataSet | None:
    """How a data folder would hold a data set of the hub; None where it is not known."""
    key = (path or "", name or "")
    return DATA_SETS.get(key) or DATA_SETS.get((key[0], "*"))
