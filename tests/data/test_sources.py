"""Sources: windows in order, documents apart, what is held out, mixtures, data sets."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rwkvx import InputError
from rwkvx.data.sources import KINDS, Reader, Rows, Source, Wanted, read_data
from rwkvx.data.sources.reader import Stream
from rwkvx.data.sources.windows import HeldOut, Windows
from rwkvx.data.tokens import write_tokens
from rwkvx.tokenizers import get_tokenizer

BYTES = get_tokenizer("bytes")


def wanted(numbers: Any, length: int, order: int = 0, fresh: int = 0) -> Wanted:
    return Wanted((order,), (fresh,), list(numbers), length)


def stream(*lengths: int) -> Stream:
    """Documents of numbered tokens, each ended by 0."""
    parts, first = [], 1
    for length in lengths:
        parts += [*range(first, first + length - 1), 0]
        first += length
    return Stream(np.asarray(parts, dtype=np.int32), np.cumsum([0, *lengths]))


def opened(folder: Path, **options: Any) -> Source:
    return read_data(options).open(Reader(BYTES, str(folder)))


def test_every_window_comes_once_before_any_comes_again() -> None:
    source = Windows(stream(1003), True, None)
    for order in (0, 1):
        epochs = [source.rows(wanted(range(e * 20, e * 20 + 20), 50, order)) for e in range(2)]
        for found in epochs:
            inputs = found.ids[:, :-1]
            assert len(set(inputs.flatten().tolist())) == 1000
            assert np.array_equal(found.ids[:, 1:-1], inputs[:, 1:])
            assert not np.array_equal(inputs[:, 0], np.sort(inputs[:, 0]))
        assert not np.array_equal(epochs[0].ids, epochs[1].ids)
    # Any row alone is the same row: a run goes on inside of an epoch.
    again = [source.rows(wanted([n], 50, 1)).ids for n in range(20, 40)]
    assert np.array_equal(np.concatenate(again), epochs[1].ids)


def test_weights_and_shapes() -> None:
    found = Windows(stream(500), True, None).rows(wanted(range(4), 60))
    assert found.ids.shape == (4, 61)
    assert found.ids.dtype == np.int64
    assert float(found.weights.sum()) == pytest.approx(1.0)
    assert not found.answers.any()
    with pytest.raises(InputError, match="has 500 tokens, a sequence needs 501"):
        Windows(stream(500), True, None).rows(wanted(range(1), 500))
    assert len(Windows(stream(500), True, None).rows(wanted(range(9), 499)).ids) == 9


def test_documents_begin_at_the_end_of_the_one_before() -> None:
    """That is what a text begins with in generation; nothing is asked across documents."""
    lengths = [7, 1, 30, 2, 55, 5, 200]
    apart = Windows(stream(*lengths), True, None).rows(wanted(range(14), 20))
    assert np.array_equal(apart.starts, apart.ids[:, :-1] == 0)
    together = Windows(stream(*lengths), False, None).rows(wanted(range(14), 20))
    assert np.array_equal(together.ids, apart.ids)
    assert not together.starts.any()


def test_a_token_zero_inside_of_a_document_begins_none(tmp_path: Path) -> None:
    made = write_tokens(tmp_path / "t", [("ab\0cd" * 9, False), ("efg", False)], BYTES)
    source = opened(tmp_path, kind="tokens", path="t", eval_share=0)
    found = source.rows(wanted([0], len(made.tokens) - 1))
    assert found.starts[0].nonzero()[0].tolist() == [45]


@pytest.mark.parametrize("kind", ["text", "tokens"])
def test_evaluation_shares_no_token_with_training(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng()
    texts = [bytes(rng.integers(33, 127, n, dtype=np.uint8)).decode() for n in (900, 700, 60, 50)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    if kind == "text":
        names = [f"{i}.txt" for i in range(4)]
        source = opened(tmp_path, kind="text", paths=names, eval_share=0.1)
    else:
        write_tokens(tmp_path / "t", [(t, i == 3) for i, t in enumerate(texts)], BYTES)
        source = opened(tmp_path, kind="tokens", path="t", eval_share=0.4)  # the file knows better
    held_out = source.evaluations()["eval"]
    assert isinstance(source, Windows)
    assert isinstance(held_out, HeldOut)
    kept = bytes(source.stream.tokens.tolist()).decode().split("\0")[:-1]
    apart = bytes(held_out.stream.tokens.tolist()).decode().split("\0")[:-1]
    assert kept + apart == texts
    assert len(apart) == (2 if kind == "text" else 1)
    seen = [row.tobytes() for row in held_out.rows(wanted(range(5), 10)).ids]
    assert len(set(seen)) == 5
    assert seen == [row.tobytes() for row in held_out.rows(wanted(range(5), 10, 3, 4)).ids]


def test_the_end_of_a_single_text_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefghij" * 20)
    source = opened(tmp_path, kind="text", paths=["a.txt"], eval_share=0.05)
    assert isinstance(source, Windows)
    assert len(source.stream.tokens) == 191
    held_out = source.evaluations()["eval"]
    assert held_out.rows(wanted(range(2), 400)).ids.shape == (2, 10)  # as long as there is text for
    assert opened(tmp_path, kind="text", paths=["a.txt"], eval_share=0).evaluations() == {}
    short = opened(tmp_path, kind="text", paths=["a.txt"], eval_share=0.006)
    with pytest.raises(InputError, match="has 1 tokens: raise eval_share"):
        short.evaluations()["eval"].rows(wanted([0], 5))


def test_other_text_for_evaluation(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 99)
    (tmp_path / "b.txt").write_text("b" * 99)
    write_tokens(tmp_path / "a.tokens", [("a" * 99, False)], BYTES)
    write_tokens(tmp_path / "b.tokens", [("b" * 99, False)], BYTES)
    for source in (
        opened(tmp_path, kind="text", paths=["a.txt"], eval_paths=["b.txt"]),
        opened(tmp_path, kind="tokens", path="a.tokens", eval_path="b.tokens"),
    ):
        assert set(source.rows(wanted([0], 99)).ids.flatten().tolist()) == {97, 0}
        held_out = source.evaluations()["eval"]
        assert set(held_out.rows(wanted([0], 99)).ids.flatten().tolist()) == {98, 0}


def test_limits(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 600)
    source = opened(
        tmp_path, kind="text", paths=["a.txt", "b.txt", "c.txt"], limit_mb=0.001, eval_share=0
    )
    assert isinstance(source, Windows)
    assert bytes(source.stream.tokens.tolist()) == b"a" * 600 + b"\0" + b"b" * 600 + b"\0"


def test_a_text_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text " * 50)
    reader = Reader(BYTES, str(tmp_path))
    first = read_data({"kind": "text", "paths": ["a.txt"]}).open(reader)
    (tmp_path / "a.txt").unlink()
    again = read_data({"kind": "text", "paths": ["a.txt"], "separate": False}).open(reader)
    assert np.array_equal(first.rows(wanted([0], 9)).ids, again.rows(wanted([0], 9)).ids)


def mixed(folder: Path, *weights: float) -> Source:
    parts = []
    for letter, weight in zip("abc", weights, strict=False):
        text = "".join(letter + str(i) for i in range(4000))
        (folder / f"{letter}.txt").write_text(text)
        parts.append({"kind": "text", "paths": [f"{letter}.txt"], "weight": weight})
    return read_data(parts).open(Reader(BYTES, str(folder)))


def letters(found: Rows) -> str:
    return "".join(next(chr(x) for x in row if chr(x).isalpha()) for row in found.ids.tolist())


def test_mixtures_keep_their_shares(tmp_path: Path) -> None:
    source = mixed(tmp_path, 5, 3, 2)
    found = source.rows(wanted(range(1000), 24))
    assert Counter(letters(found)) == {"a": 500, "b": 300, "c": 200}
    some = Counter(letters(source.rows(wanted(range(200), 24))))
    assert 70 < some["a"] < 130
    assert letters(source.rows(wanted(range(40), 24))) != "a" * 20 + "b" * 12 + "c" * 8


def test_rows_of_a_mixture_stand_for_themselves(tmp_path: Path) -> None:
    """Any row alone is the same; the sources' own rows come once each."""
    source = mixed(tmp_path, 1, 2)
    numbers = [5, 1999, 0, 7, 1001, 1000, 3]
    found = source.rows(wanted(numbers, 24))
    for row, number in zip(found.ids, numbers, strict=True):
        assert np.array_equal(source.rows(wanted([number], 24)).ids[0], row)
    assert float(found.weights.sum()) == pytest.approx(1.0)
    assert len({row.tobytes() for row in source.rows(wanted(range(2000), 9)).ids}) == 2000
    assert list(source.evaluations()) == ["text-1/eval", "text-2/eval"]


def test_a_mixture_of_kinds(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc " * 500)
    parts = [{"kind": "text", "paths": ["a.txt"]}, {"kind": "passkey", "prose": 0, "weight": 3}]
    source = read_data(parts).open(Reader(BYTES, str(tmp_path)))
    found = source.rows(wanted(range(40), 300))
    answered = found.answers.any(1)
    assert 20 < answered.sum() < 40
    share = float(found.weights[answered].sum()) / float(answered.mean())
    assert share == pytest.approx(1.2, rel=1e-3)  # passkey's other tokens come on top
    assert list(source.evaluations()) == ["text/eval", "passkey/standard"]


def test_data_sets(tmp_path: Path) -> None:
    """Real ones, from the disk: as saved by the library, and as a folder of data files."""
    datasets = pytest.importorskip("datasets")
    items = datasets.Dataset.from_dict({"text": ["one", "two"], "body": ["three", "four"]})
    items.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"dev": items}).save_to_disk(str(tmp_path / "split"))
    (tmp_path / "plain").mkdir()
    items.to_parquet(str(tmp_path / "plain" / "train.parquet"))

    def read(**options: Any) -> bytes:
        source = opened(tmp_path, kind="hub", eval_share=0, **options)
        assert isinstance(source, Windows)
        return bytes(source.stream.tokens.tolist())

    assert read(name=str(tmp_path / "saved")) == b"one\0two\0"
    assert read(name=str(tmp_path / "split"), split="dev", column="body") == b"three\0four\0"
    for streaming in (True, False):
        assert read(name=str(tmp_path / "plain"), streaming=streaming) == b"one\0two\0"
    with pytest.raises(InputError, match="no text in column 'title'"):
        read(name=str(tmp_path / "saved"), column="title")
    with pytest.raises(InputError, match="cannot read the data set"):
        read(name=str(tmp_path / "split"), split="nowhere")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "data holds no mapping: 3"),
        ([], "data lists no source"),
        ([3], r"data\[0\] holds no mapping"),
        ({}, r"data\.kind must be one of text, tokens, hub, chat, passkey, got None"),
        ({"kind": "images"}, r"data\.kind must be one of .* got 'images'"),
        ({"kind": ["text"]}, r"data\.kind must be one of"),
        ({"kind": "text"}, 'missing value for field "paths"'),
        ({"kind": "text", "paths": []}, "paths names no text file"),
        ({"kind": "text", "paths": "a.txt"}, '"paths" - should be'),
        ({"kind": "text", "paths": ["a"], "prose": 1}, r"unknown key 'prose' in data \(text\)"),
        ({"kind": "text", "paths": ["a"], "eval_share": 0.7}, "eval_share must be a number from 0"),
        ({"kind": "text", "paths": ["a"], "limit_mb": float("nan")}, "limit_mb must be a number"),
        ({"kind": "text", "paths": ["a"], "weight": 0}, "weight must be a number above 0"),
        ({"kind": "text", "paths": ["a\0b"]}, "is no name of a file"),
        ({"kind": "passkey", "prose": 2}, "prose must be a number from 0 to 1"),
        ({"kind": "chat", "paths": ["a"], "learn": "much"}, "learn must be one of answers, all"),
    ],
)
def test_mistakes(value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_data(value).open(Reader(BYTES, str(tmp_path)))
    assert len(str(caught.value)) <= 300


def test_every_kind_explains_its_options() -> None:
    for kind, options in KINDS.items():
        for name in options.__dataclass_fields__:
            assert f"{name}" in options.__doc__, f"{kind}: {name}"
