"""A data folder in the layout of the real one: an invented book and invented bAbI stories."""

from __future__ import annotations

import io
import lzma
import random
import tarfile
from pathlib import Path

NOUNS = ["river", "house", "garden", "captain", "letter", "window", "winter", "soldier", "market"]
VERBS = ["saw", "left", "found", "followed", "remembered", "answered", "painted", "carried"]
PEOPLE = ["Mary", "John", "Daniel", "Sandra"]
PLACES = ["kitchen", "hallway", "garden", "office", "bathroom", "bedroom"]


def write_data(folder: Path, sentences: int = 6000) -> Path:
    """Writes the folder; returns it."""
    rng = random.Random(7)
    book = "\n\n".join(
        " ".join(_sentence(rng) for _ in range(rng.randrange(2, 7))) for _ in range(sentences // 4)
    )
    (folder / "long_docs").mkdir(parents=True)
    (folder / "long_docs" / "invented.txt.xz").write_bytes(lzma.compress(book.encode()))
    (folder / "babi_tasks_v1-2").mkdir()
    with tarfile.open(folder / "babi_tasks_v1-2" / "babi.tar.xz", "w:xz") as tar:
        for number in range(1, 21):
            text = "".join(_story(rng) for _ in range(40)).encode()
            member = tarfile.TarInfo(f"babi_tasks_v1-2/en-10k/qa{number}_invented_test.txt")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
    return folder


def _sentence(rng: random.Random) -> str:
    words = [f"{rng.choice(VERBS)} the {rng.choice(NOUNS)}" for _ in range(rng.randrange(1, 4))]
    speech = rng.random() < 0.2
    text = f"The {rng.choice(NOUNS)} of {rng.randrange(1700, 1900)} " + ", and ".join(words)
    return f"“{text}!”" if speech else f"{text}."


def _story(rng: random.Random) -> str:
    """Moves of people, and after every second one where the last of them is."""
    lines: list[str] = []
    where: dict[str, tuple[str, int]] = {}
    for number in range(1, 13):
        if number % 3:
            person, place = rng.choice(PEOPLE), rng.choice(PLACES)
            where[person] = (place, number)
            lines.append(f"{number} {person} went to the {place}.")
        else:
            person = rng.choice(list(where))
            place, at = where[person]
            lines.append(f"{number} Where is {person}? \t{place}\t{at}")
    return "\n".join(lines) + "\n"
