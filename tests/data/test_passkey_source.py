"""Passkey samples: the right answers, weights, fillers, pieces, and enough room."""

import re

import numpy as np
import pytest
from numpy.typing import NDArray

from rwkvx import InputError
from rwkvx.data.passkey import QUESTION, needle_text
from rwkvx.data.sources import Reader, Rows, Wanted, read_data
from rwkvx.data.sources.passkey import Passkey, Prompts
from rwkvx.tokenizers import get_tokenizer

BYTES = get_tokenizer("bytes")
PROSE = np.frombuffer(b"Call me Ishmael. " * 200, dtype=np.uint8).astype(np.int32)
ISHMAEL = ("unread.txt",)


def prompts(
    prose: float = 0.5, text: NDArray[np.int32] | None = PROSE, **options: float
) -> Prompts:
    """A source whose prose is `text`, which no file holds."""
    paths = ISHMAEL if text is not None else ()
    return Prompts(Passkey(paths=paths, prose=prose, **options), BYTES, text)  # type: ignore[arg-type]


def rows(source: Prompts, count: int = 6, length: int = 400, seed: int = 0, size: int = 0) -> Rows:
    return source.rows(Wanted((0,), (seed,), range(count), length, size))


def texts(found: Rows) -> list[bytes]:
    return [bytes(row.tolist()) for row in found.ids[:, :-1]]


@pytest.mark.parametrize("prose", [0.0, 0.5, 1.0])
def test_samples(prose: float) -> None:
    """The answers are the right number, where the next token is asked for."""
    found = rows(prompts(prose), seed=3)
    assert found.ids.shape == (6, 401)
    assert not found.starts.any()
    for text, ids, answers in zip(texts(found), found.ids, found.answers, strict=True):
        answer = bytes(ids[1:][answers].tolist())
        key = text.partition(b"The pass key is ")[2].partition(b".")[0]
        assert answer == b" " + key + b".\0"
        assert 1 <= int(key) <= 99_999
        first = int(answers.nonzero()[0][0])
        assert text[: first + 1].endswith(QUESTION.encode())
        assert text.count(b"The pass key is " + key + b". Remember it.") == 1
        assert (b"Ishmael" in text) == (prose == 1.0) or prose == 0.5


def test_weights() -> None:
    """All answers together weigh one, all other tokens `other_weight`, padding nothing."""
    found = rows(prompts(other_weight=0.2), seed=4)
    assert float(found.weights[found.answers].sum()) == pytest.approx(1.0)
    assert float(found.weights[~found.answers].sum()) == pytest.approx(0.2)
    assert float(found.weights[found.answers].std()) == pytest.approx(0.0, abs=1e-7)
    for weights, answers in zip(found.weights, found.answers, strict=True):
        end = int(answers.nonzero()[0][-1])
        assert not weights[end + 1 :].any()
        assert (weights[: end + 1] > 0).all()
    silent = rows(prompts(other_weight=0.0), seed=4)
    assert not silent.weights[~silent.answers].any()


def test_asking_again() -> None:
    """In pieces after the needle's, in the filler, with answers that count."""
    source = prompts(0.0, None, ask_again=1.0)
    found, seen = rows(source, 16, 1024, size=128), set()
    for text, ids, answers in zip(texts(found), found.ids, found.answers, strict=True):
        line = text.decode()
        needle = line.index("\nThe pass key is ")
        key = re.match(r"\nThe pass key is (\d+)\. Remember it\.", line[needle:]).group(1)  # type: ignore[union-attr]
        asked = [m.start() for m in re.finditer(r"\nWhat is the pass key\?", line)]
        pieces = [start // 128 for start in asked[:-1]]
        first = (needle + len(source.builder.needle(int(key)))) // 128 + 1
        assert pieces == list(range(first, 7))
        assert bytes(ids[1:][answers].tolist()) == f" {key}.".encode() * len(asked) + b"\0"
        seen.add(len(asked))
    assert len(seen) > 3
    plain = texts(rows(prompts(0.0, None), 16, 1024, size=128))
    assert all(text.count(b"\nWhat is the pass key?") == 1 for text in plain)


def test_each_filler_is_evaluated_alone() -> None:
    parts = prompts(0.5).evaluations()
    assert list(parts) == ["standard", "prose"]
    for name, part in parts.items():
        assert isinstance(part, Prompts)
        assert {b"Ishmael" in text for text in texts(rows(part, 20))} == {name == "prose"}
    assert list(prompts(0.0, None).evaluations()) == ["standard"]


def test_noise_replaces_prose_alone() -> None:
    known = set(b"Call me Ishmael. ")

    def strange(noise: float) -> list[float]:
        shares = []
        for text in texts(rows(prompts(1.0, noise=noise), 20)):
            start = text.index(b"information there.\n") + 19
            prose = text[start : text.rindex(b"\nWhat is the pass key?")]
            needle = prose.index(b"\nThe pass key is ")
            prose = prose[:needle] + prose[needle + 60 :]  # whole and untouched
            shares.append(sum(b not in known for b in prose) / max(1, len(prose)))
        return shares

    assert max(strange(0.0)) < 0.05  # the needle's last bytes
    found = strange(0.5)
    assert min(found) < 0.1 < 0.3 < max(found) < 0.6


def test_numbers_in_prose() -> None:
    found = [
        len(re.findall(rb" \d{1,5}\. ", text.split(b"information there.")[1]))
        for text in texts(rows(prompts(1.0, numbers=40.0), 20))
    ]
    assert min(found) < 3  # two are the needle's and the answer's
    assert max(found) > 4


def test_samples_are_seeded_and_fresh() -> None:
    source = prompts()
    first, again, other = (rows(source, seed=s) for s in (5, 5, 6))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first.ids, other.ids)
    seen = {text for s in range(20) for text in texts(rows(source, seed=s))}
    assert len(seen) == 120
    ends = {int(rows(source, seed=s).answers[0].nonzero()[0][-1]) for s in range(30)}
    assert len(ends) > 10, "the alignment of prompts to chunks varies"


def test_needles_stand_whole_in_one_piece_before_the_last() -> None:
    for text in texts(rows(prompts(0.0, None), 32, 1024, size=256)):
        line = text.decode("latin-1")
        start = line.index("\nThe pass key is ")
        key = int(line[start:].split("is ")[1].split(".")[0])
        assert start // 256 == (start + len(needle_text(key)) + 1) // 256 < 3


def test_keys_are_about_as_long_as_those_asked() -> None:
    """Ending a key early must not be a good guess: few training keys are short."""
    digits = rows(prompts(0.0, None), 256, 300).answers.sum(1) - 3  # a space, a stop, the end
    assert float((digits >= 4).mean()) > 0.9
    assert float((digits == 5).mean()) > 0.45


def test_room_is_needed() -> None:
    with pytest.raises(InputError, match="of 100 tokens is too short: prompt and answer need 2"):
        rows(prompts(), 1, 100)
    with pytest.raises(InputError, match="prose of paths has 3400 tokens"):
        rows(prompts(1.0), 1, 3500)
    with pytest.raises(InputError, match="prose > 0 needs paths"):
        read_data({"kind": "passkey"})
    opened = read_data({"kind": "passkey", "prose": 0}).open(Reader(BYTES))
    assert opened.rows(Wanted((0,), (0,), range(2), 400)).answers.any()


def test_the_shortest_length_that_is_said_to_work_works() -> None:
    source = prompts(0.0, None)
    with pytest.raises(InputError) as caught:
        rows(source, 1, 100)
    needed = int(str(caught.value).split(" need ")[1].split()[0])
    for seed in range(40):  # keys of any length
        assert rows(source, 1, needed + 4, seed).answers.any()
