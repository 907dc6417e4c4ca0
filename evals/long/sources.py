"""Texts that prompts are made of: noise, books, bAbI stories, words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from rwkvx.data.folder import DATA_VARIABLE, read_text
from rwkvx.data.passkey import STANDARD_FILLER
from rwkvx.errors import InputError, shown
from rwkvx.files import tar_members, text_of, user_path

# The sentences that the passkey test, RULER and InfiniteBench repeat.
NOISE = STANDARD_FILLER

BOOKS = "books_public_domain/books_pd.tar.xz"
LONG_BOOKS = "long_docs"
BABI = "babi_tasks_v1-2/babi.tar.xz"
ARCHIVE_BYTES = 4_000_000_000  # read one text at a time

_LONGEST_SENTENCE = 1000  # characters; longer ones (tables, other scripts) are cut between words
# A full stop, what closes a quotation, white space, and the start of a sentence; not after titles
# and initials. It only decides where a needle may stand.
_SENTENCE_END = re.compile(
    r"(?<!\bMr)(?<!\bMrs)(?<!\bDr)(?<!\bSt)(?<!\b[A-Z])[.!?][\"'”’)\]]*( )(?=[\"'“‘(\[]*[A-Z0-9])"
)


def sentences(text: str) -> Iterator[str]:
    """The sentences of a text, one after another; white space becomes single spaces."""
    text = " ".join(text.split())
    start = 0
    for match in _SENTENCE_END.finditer(text):
        yield from _short(text[start : match.start(1)])
        start = match.end(1)
    if start < len(text):
        yield from _short(text[start:])


def _short(sentence: str) -> Iterator[str]:
    while len(sentence) > _LONGEST_SENTENCE:
        cut = sentence.rfind(" ", 1, _LONGEST_SENTENCE)
        cut = cut if cut > 0 else _LONGEST_SENTENCE
        yield sentence[:cut]
        sentence = sentence[cut:].removeprefix(" ")
    if sentence:
        yield sentence


def find_haystack(name: str, data: Path | None) -> Path:
    """`name` as a file, or inside the data folder or its `long_docs`; raises InputError."""
    places = [user_path(name)]
    if data is not None:
        places += [data / name, data / LONG_BOOKS / name]
    for place in places:
        if place.is_file():
            return place
    looked = ", ".join(str(place) for place in places)
    raise InputError(f"haystack {shown(name)} is not a file (looked at {looked})")


def books(data: Path | None, book: Path | None) -> Iterator[str]:
    """Whole books: `book` alone where one is given, else those of the data folder.

    The long documents come first, as the shipped models were not trained on them, by file name.
    Raises InputError where there is neither a book nor a folder that holds some.
    """
    if book is not None:
        yield read_text(book)
        return
    files = sorted((data / LONG_BOOKS).glob("*.xz")) if data is not None else []
    archive = data / BOOKS if data is not None else None
    if not files and (archive is None or not archive.is_file()):
        raise InputError(
            f"{_where(data)} holds no books: name a folder with {LONG_BOOKS}/*.xz or {BOOKS} by "
            f"--data or {DATA_VARIABLE}, or one book (.txt, .xz) by --haystack"
        )
    for file in files:
        yield read_text(file)
    if archive is not None and archive.is_file():
        for name, content in tar_members(archive, (".txt",), ARCHIVE_BYTES):
            yield text_of(content, f"{archive}: {name}")


def _where(data: Path | None) -> str:
    return "no data folder is given, and this package" if data is None else f"data folder {data}"


@dataclass(frozen=True)
class Story:
    """One bAbI question with the facts that stand before it.

    support: numbers of the facts that the answer follows from, from 0.
    """

    facts: tuple[str, ...]
    question: str
    answer: str
    support: tuple[int, ...]


@cache
def babi(data: Path | None, number: int) -> tuple[Story, ...]:
    """The test questions of bAbI task 1 … 20 (en-10k), in the order of the file.

    Raises InputError where the data folder does not hold them.
    """
    archive = data / BABI if data is not None else None
    if archive is None or not archive.is_file():
        raise InputError(
            f"{_where(data)} holds no bAbI tasks: name a folder with {BABI} by --data or "
            f"{DATA_VARIABLE}"
        )
    for name, content in tar_members(archive, ("_test.txt",), ARCHIVE_BYTES):
        if f"en-10k/qa{number}_" in name:
            return tuple(_stories(text_of(content, f"{archive}: {name}")))
    raise InputError(f"{archive} holds no en-10k/qa{number}_*_test.txt")


def _stories(text: str) -> Iterator[Story]:
    """Lines are `number text`, or `number question TAB answer TAB numbers`; 1 starts a story."""
    facts: list[str] = []
    place: dict[int, int] = {}  # line number → number of the fact
    for line in text.splitlines():
        number, _, rest = line.partition(" ")
        if int(number) == 1:
            facts, place = [], {}
        content, *answer = rest.split("\t")
        if answer:
            support = tuple(place[int(n)] for n in answer[1].split())
            yield Story(tuple(facts), content.strip(), answer[0], support)
        else:
            place[int(number)] = len(facts)
            facts.append(content.strip())


@cache
def words(kind: str) -> tuple[str, ...]:
    """Common English words of a kind, "noun", "adjective" or "verb", in alphabetical order.

    They are those of the package `wonderwords`, which RULER takes its needles from. Raises
    InputError where it is not installed.
    """
    try:
        from wonderwords import RandomWord
    except ImportError as error:
        raise InputError(
            "this task takes its words from the package wonderwords: install rwkvx[eval]"
        ) from error
    return tuple(sorted(set(RandomWord.read_words(f"{kind}list.txt"))))


def random_pair(rng: np.random.Generator) -> str:
    """`adjective-noun`, as RULER names its needles."""
    adjectives, nouns = words("adjective"), words("noun")
    return f"{adjectives[rng.integers(len(adjectives))]}-{nouns[rng.integers(len(nouns))]}"
