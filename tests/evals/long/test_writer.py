"""Prompts: exact lengths, tokens of the whole text, needles whole and where they should be."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count, cycle
from pathlib import Path

import numpy as np
import pytest

from rwkvx.errors import InputError
from rwkvx_evals.long.haystack import Haystack, Table
from rwkvx_evals.long.sources import NOISE, books, sentences
from rwkvx_evals.long.task import Sample
from rwkvx_evals.long.writer import Layout, Writer

KINDS = ["world", "bytes", "words", "marked", "across"]
MakeWriter = Callable[..., Writer]


@dataclass(frozen=True)
class Any:
    """A task of which only the name and the answer's room matter."""

    name: str = "any"
    answer_tokens: int = 10
    about: str = ""
    source: str = ""
    stop: tuple[str, ...] = ()

    def sample(self, writer: Writer, length: int, index: int) -> Sample:
        raise NotImplementedError

    def score(self, answer: str, sample: Sample) -> float:
        raise NotImplementedError


TASK = Any()


def decoded(writer: Writer, ids: np.ndarray) -> str:
    return writer._tokenizer.decode(ids[len(writer.begin) :].tolist())


def haystacks(writer: Writer) -> list[Haystack]:
    """Lines, sentences, lines that begin with a space, and records."""
    return [
        writer.noise(),
        writer.books(),
        writer.noise(before=" "),
        writer.haystack("records", lambda: (f', "{n}": {n * n}' for n in count()), before=", "),
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", range(4))
def test_lengths_are_exact_and_tokens_those_of_the_text(
    writer: MakeWriter, kind: str, number: int
) -> None:
    made, rng = writer(kind), np.random.default_rng(number)
    hay = haystacks(made)[number]
    for index in range(12):
        length = int(rng.integers(400, 3000))
        depths = np.sort(rng.random(rng.integers(0, 5)))
        needles = [
            (float(depth), f"{hay.before}The word of {n} is {rng.integers(10**6)}.{hay.after}")
            for n, depth in enumerate(depths)
        ]
        layout = Layout("Read this.\n", hay, f"\nWhat is {index}? It is", needles)
        sample = made.sample(TASK, length, index, layout, ["x"])
        assert sample.ids.dtype == np.int64
        assert len(sample.ids) + TASK.answer_tokens == length
        assert decoded(made, sample.ids) == sample.text
        places = [sample.text.index(text.strip()) for _, text in needles]
        assert places == sorted(places)
        assert sample.text.startswith("Read this.\n")
        assert sample.text.endswith(layout.tail)
        if hay.exact:
            assert made.reads_as_written(sample)
    # Only the tokenizer that merges over sentences and lines may leave no place to cut.
    assert hay.exact or kind == "across"


def test_what_is_between_the_needles_is_the_haystack(writer: MakeWriter) -> None:
    made = writer("world")
    hay = made.books()
    needles = [(0.0, " First needle."), (0.5, " Second needle."), (1.0, " Third needle.")]
    text = made.sample(TASK, 2000, 0, Layout("Head\n", hay, "\nTail", needles), []).text
    before, first, second, third = text.replace("Head\nFirst", "Head\n First").split(" needle.")
    assert before == "Head\n First"
    whole = first.removesuffix(" Second") + second.removesuffix(" Third")
    assert hay.text(0, len(hay)).startswith(whole)
    assert abs(len(first) - len(second)) < 200  # two sentences
    words = third.removesuffix("\nTail").removeprefix(" ").split(" ")
    assert words[:-1] == (NOISE.split() * 9)[: len(words) - 1]


def test_samples_share_the_haystack_up_to_the_needle(writer: MakeWriter) -> None:
    made = writer("world")
    prompts = [
        made.sample(TASK, 4000, n, Layout("H\n", made.noise(), "Q", [(0.7, f"N {n}.\n")]), []).ids
        for n in (5, 77_777)
    ]
    same = int(np.argmin(prompts[0] == prompts[1]))
    assert 0.65 * 4000 < same < 0.75 * 4000


def test_no_order_of_asking_changes_a_sample(writer: MakeWriter) -> None:
    def asked(made: Writer, length: int) -> bytes:
        layout = Layout("H\n", made.books(), "\nQ", [(0.5, " A needle.")])
        return made.sample(TASK, length, 3, layout, []).ids.tobytes()

    first, second = writer(), writer()
    short, long = asked(first, 500), asked(first, 5000)
    assert (asked(second, 5000), asked(second, 500)) == (long, short)


def test_the_unit_after_those_that_fit_is_always_there(writer: MakeWriter) -> None:
    """Or what fits would depend on how far a haystack was read for other lengths."""
    encode = writer("bytes").encode
    for tokens in range(0, 1400):
        hay = Haystack("lines", cycle(["nine____\n"]), encode, after="\n")
        hay.reach(tokens)
        assert len(hay) > hay.fitting(tokens)
        assert hay.fitting(tokens) == tokens // 9


def test_randomness_is_a_function_of_seed_and_key(writer: MakeWriter) -> None:
    drawn = [writer(seed=seed).rng("task", 4096, 1).integers(2**60) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    # Written down once: on another machine, or in a year, it has to be the same.
    assert writer().rng("passkey", 4096, 7).integers(2**32) == 3_854_309_911


def test_the_token_that_begins_a_text_is_there_once(writer: MakeWriter) -> None:
    made = writer("marked")
    ids = made.sample(TASK, 600, 0, Layout("H\n", made.noise(), "Q"), []).ids
    assert made.begin.tolist() == [ids[0]]
    assert ids.tolist().count(ids[0]) == 1
    assert len(ids) == 590


def test_memory_stays_flat(writer: MakeWriter) -> None:
    made = writer()
    layout = Layout("H\n", made.books(), "\nQ", [(0.5, " A needle.")])
    made.sample(TASK, 40_000, 0, layout, [])
    tracemalloc.start()
    for index in range(30):
        made.sample(TASK, 40_000, index, layout, [])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * 40_000 * 8  # a few times the ids of one sample, not of thirty


def test_a_cut_may_lie_beside_its_place(writer: MakeWriter) -> None:
    """World has a token for a line break and a space: the cut lies behind it."""
    made = writer("world")
    hay = made.noise(before=" ")
    hay.reach(500)
    assert hay.text(1, 2) != f" {NOISE}\n"
    assert hay.text(1, 2, opens=True, closes=True) == f" {NOISE}\n"


def test_a_place_is_the_nearest(writer: MakeWriter) -> None:
    hay = Haystack("six", iter(["aaaa ", "b ", "cc ", "d "]), writer("bytes").encode)
    hay.reach(12)
    assert [hay.size(n) for n in range(5)] == [0, 5, 7, 10, 12]
    assert [hay.place(depth, 4) for depth in (0, 0.2, 0.25, 0.45, 0.6, 0.9, 1)] == [
        0,
        0,
        1,
        1,
        2,
        3,
        4,
    ]
    assert [hay.fitting(tokens) for tokens in (0, 4, 5, 9, 12, 99)] == [0, 0, 1, 2, 4, 4]


def test_rows_are_gathered_as_they_would_be_encoded(writer: MakeWriter) -> None:
    for kind in KINDS:
        made, rng = writer(kind), np.random.default_rng(1)
        texts = [f" word{n}" for n in range(50)] + [" back", " again.", " go"]
        table = Table(texts, made.encode)
        order = rng.integers(len(texts), size=400)
        row = table.row("row", order, before=" ")
        assert row.text(0, len(row)) == "".join(texts[n] for n in order)
        assert np.array_equal(row.ids(0, len(row)), made.encode(row.text(0, len(row))))


def test_sentences() -> None:
    text = "Mr. Smith came.  He  said: “No!” Then\nJ. R. left… 3 of them? yes. (So.) End"
    parts = [
        "Mr. Smith came.",
        "He said: “No!”",
        "Then J. R. left… 3 of them? yes.",
        "(So.)",
        "End",
    ]
    assert list(sentences(text)) == parts
    assert all(len(part) <= 1000 for part in sentences("word " * 900 + "x" * 3000))
    assert "".join(sentences("x" * 3500)) == "x" * 3500


# ------------------------------------------------------------- what a user can mend


def test_too_short_says_how_many_it_needs(writer: MakeWriter) -> None:
    made = writer("bytes")
    layout = Layout("Head\n", made.noise(), "\nTail", [(0.5, "A needle\n")])
    with pytest.raises(InputError, match=r"any needs at least 29 tokens .* not 28"):
        made.sample(TASK, 28, 0, layout, [])
    assert made.sample(TASK, 29, 0, layout, []).text == "Head\nA needle\n\nTail"


def test_a_book_that_is_too_short(writer: MakeWriter, tmp_path: Path) -> None:
    book = tmp_path / "short.txt"
    book.write_text("It was short. " * 20)
    made = writer("bytes", book=book)
    layout = Layout("Head\n", made.books(), "\nTail")
    assert len(made.sample(TASK, 200, 0, layout, []).ids) == 190
    with pytest.raises(InputError, match=r"short.txt has 280 tokens, .* needs 4,980"):
        made.sample(TASK, 5000, 0, layout, [])


def test_no_books(writer: MakeWriter, tmp_path: Path) -> None:
    for data, where in ((None, "no data folder is given"), (tmp_path, str(tmp_path))):
        made = writer(data=data)
        with pytest.raises(InputError, match=f"{where}.*long_docs/.*--data.*--haystack"):
            made.sample(TASK, 500, 0, Layout("H", made.books(), "T"), [])
    with pytest.raises(InputError, match="cannot read"):
        next(books(None, tmp_path / "none.txt"))


def test_a_tokenizer_without_letters() -> None:
    class Digits:
        def encode(self, text: str, /, *, add_special_tokens: bool = False) -> list[int]:
            return [int(letter) for letter in text if letter.isdigit()]

        def decode(self, ids: list[int], /) -> str:
            return "".join(map(str, ids))

    with pytest.raises(InputError, match="cannot write"):
        Writer(Digits())


def test_a_tokenizer_with_which_no_count_is_exact() -> None:
    class Pairs:
        """Every text has an even number of tokens."""

        def encode(self, text: str, /, *, add_special_tokens: bool = False) -> list[int]:
            return [byte // half or 1 for byte in text.encode() for half in (1, 300)]

        def decode(self, ids: list[int], /) -> str:
            return bytes(ids[::2]).decode(errors="replace")

    made = Writer(Pairs())
    hay = Haystack("lines", cycle(["line\n"]), made.encode)
    assert len(made.sample(TASK, 500, 0, Layout("H\n", hay, "T"), []).ids) == 490
    with pytest.raises(InputError, match="no prompt of exactly 501 tokens"):
        made.sample(TASK, 501, 0, Layout("H\n", hay, "T"), [])
