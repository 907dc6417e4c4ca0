"""Documents: kinds of files, damage, wrapped lines, the tail that is held out."""

import bz2
import gzip
import io
import json
import lzma
import random
import tarfile
import textwrap
from pathlib import Path

import numpy as np
import pytest

from rwkvx import InputError
from rwkvx.data.documents import find_files, held_out_tail, read_documents, unwrap

LINES = "\n".join(json.dumps({"text": t}) for t in ("three", "a\nb")) + "\n\n"


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:xz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_kinds_of_files(tmp_path: Path) -> None:
    contents = {
        "a.txt": b"one",
        "b.txt.xz": lzma.compress(b"two"),
        "c.jsonl": LINES.encode(),
        "d.jsonl.gz": gzip.compress(LINES.encode()),
        "e.md.bz2": bz2.compress("z\u00fcrich".encode()),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    write_tar(tmp_path / "f.tar.xz", {"x/f.txt": b"four", "x/picture.png": b"\0", "y.md": b"five"})

    def read(*names: str) -> list[str]:
        return list(read_documents(find_files(names, str(tmp_path))))

    assert read("a.txt") == ["one"]
    assert read("b.txt.xz", "a.txt") == ["two", "one"]
    assert read("c.jsonl") == read("d.jsonl.gz") == ["three", "a\nb"]
    assert read("e.md.bz2") == ["z\u00fcrich"]
    assert read("f.tar.xz") == ["four", "five"]


def test_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("one")
    monkeypatch.setenv("RWKVX_DATA", str(tmp_path))
    assert find_files(["a.txt"]) == [tmp_path / "a.txt"]
    monkeypatch.delenv("RWKVX_DATA")
    with pytest.raises(InputError, match=r"text a\.txt is not there: .*--data or RWKVX_DATA"):
        find_files(["a.txt"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"ab\xff\xfe\xff", "not UTF-8"),
        ("a.txt", b"ab\0c", "NUL"),
        ("a.txt.xz", b"not xz", "cannot read"),
        ("a.txt.xz", lzma.compress(b"text" * 1000)[:-20], "cannot read"),
        ("a.tar.xz", lzma.compress(b"text" * 1000)[:60], "cannot read"),
        ("a.tar.xz", b"nothing", "cannot read"),
        ("a.jsonl", b'{"text": "a"}\n{"title": "b"}\n', 'line 2: no JSON object with a "text"'),
        ("a.jsonl", b'{"text": 3}\n', "line 1: no JSON"),
        ("a.jsonl", b"[1]\n", "line 1: no JSON"),
        ("a.jsonl", b"{\n", "line 1 is damaged"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        list(read_documents([tmp_path / name]))
    assert name in str(caught.value)


def test_truncated_archives(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(1, 127, 50_000, dtype=np.uint8).tobytes()
    write_tar(tmp_path / "a.tar.xz", {"a.txt": noise})
    whole = (tmp_path / "a.tar.xz").read_bytes()
    (tmp_path / "a.tar.xz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot read"):
        list(read_documents([tmp_path / "a.tar.xz"]))


def test_wrapped_paragraphs_are_joined(tmp_path: Path) -> None:
    """What `textwrap` cuts comes back; paragraphs, and texts with long lines, stay."""
    rng = random.Random(1)
    words = ["a", "few", "words", "of", "several", "lengths", "intermingled", "here."]
    paragraphs = [" ".join(rng.choices(words, k=rng.randint(30, 200))) for _ in range(40)]
    for separator in ("\n", "\n\n"):
        whole = separator.join(paragraphs)
        wrapped = separator.join(textwrap.fill(p, 70) for p in paragraphs)
        found = unwrap(wrapped)
        # The last line of a paragraph may be too full for the next one's first word.
        assert found.count("\n") >= 0.75 * whole.count("\n")
        assert " ".join(found.split()) == " ".join(whole.split())
        assert sum(p in found for p in paragraphs) >= 30
        assert unwrap(whole) == whole
    verse = "\n".join(["Tiger, tiger,", "burning bright", "in the forests", "of the night,"] * 9)
    assert unwrap(verse).count("\n") >= 30
    for text in ("", "\n\n", "one line"):
        assert unwrap(text) == text


def test_the_tail_is_held_out() -> None:
    texts = ["a" * 60, "b" * 25, "c" * 10, "d" * 5]

    def tail(texts: list[str], share: float) -> list[tuple[str, bool]]:
        return list(held_out_tail(texts, [len(t) for t in texts], share))

    assert [held for _, held in tail(texts, 0.2)] == [False, False, True, True]
    assert [held for _, held in tail(texts, 0.05)] == [False, False, False, True]
    assert [held for _, held in tail(texts, 0)] == [False] * 4
    cut = tail(["x" * 10, "some words " * 10], 0.1)  # no document begins in the last tenth
    assert [held for _, held in cut] == [False, False, True]
    assert "".join(text for text, _ in cut) == "x" * 10 + "some words " * 10
    assert 1 <= len(cut[2][0]) <= 12
    assert cut[2][0].startswith(("some", "words"))
