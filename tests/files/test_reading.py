"""Reading: regular files only, within limits; text with a mark; JSON and YAML that are no traps."""

import bz2
import codecs
import gzip
import io
import lzma
import os
import struct
import tarfile
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from rwkvx.errors import InputError
from rwkvx.files import (
    open_regular,
    parse_json,
    parse_yaml,
    read_bytes,
    read_json,
    read_lines,
    read_text,
    read_yaml,
    tar_members,
    user_path,
)

MB = 1_000_000


def loop(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (os.mkfifo, "it is a pipe"),
        (Path.mkdir, "it is a folder"),
        (lambda path: path.symlink_to("/dev/zero"), "it is a device"),
        (loop, "Too many levels of symbolic links"),
        (lambda path: None, "No such file"),
    ],
)
def test_only_regular_files_are_opened(
    make: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "thing"
    make(path)
    for read in (open_regular, read_json, read_yaml, read_text, lambda p: list(read_lines(p))):
        with pytest.raises(InputError, match=message) as caught:
            read(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["", "a\0b", "a\ud800", "~nobody-of-that-name/x"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(InputError):
        user_path(name)


def test_no_more_than_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x" * 10)
    assert read_bytes(path, 10) == b"x" * 10
    with pytest.raises(InputError, match="has more than 9 bytes"):
        read_bytes(path, 9)
    with pytest.raises(InputError, match="has more than 10 bytes"):
        read_bytes(Path("/proc/cpuinfo"), 10)  # without a size of its own


MARKS = {
    "utf-8": b"", "utf-8-sig": b"", "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE, "utf-32-le": codecs.BOM_UTF32_LE,
}  # fmt: skip


@pytest.mark.parametrize("encoding", MARKS)
def test_byte_order_marks(encoding: str, tmp_path: Path) -> None:
    def write(name: str, text: str) -> Path:
        (tmp_path / name).write_bytes(MARKS[encoding] + text.encode(encoding))
        return tmp_path / name

    assert read_text(write("a.txt", "é\n今")) == "é\n今"
    assert read_json(write("a.json", '{"é": 1}')) == {"é": 1}
    assert read_yaml(write("a.yaml", "é: 1\n")) == {"é": 1}
    if "32" not in encoding:
        assert list(read_lines(write("a.jsonl", "é\n今")))[:2] == ["é", "今"]


@pytest.mark.parametrize("data", [b"\xff", b"a\xe9", b"\xff\xfea"])
def test_other_encodings_are_named(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(InputError, match=r"a\.txt is damaged: it is not UTF-8"):
        read_text(tmp_path / "a.txt")


PACKED = {".xz": lzma.compress, ".gz": gzip.compress, ".bz2": bz2.compress}


@pytest.mark.parametrize("suffix", PACKED)
def test_packed_text(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(PACKED[suffix](b"one\ntwo"))
    assert read_text(path) == "one\ntwo"
    assert list(read_lines(path)) == ["one", "two"]
    for damaged in (b"", b"x" * 100, path.read_bytes()[:-3]):
        path.write_bytes(damaged)
        if damaged or suffix == ".xz":
            with pytest.raises(InputError, match="cannot read"):
                read_text(path)


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize("unit", [b"\0", b"a"])
def test_what_unpacks_to_far_too_much(suffix: str, unit: bytes, tmp_path: Path) -> None:
    """Thirty megabytes in a few kilobytes: no more than half of them is ever unpacked."""
    path = tmp_path / f"a{suffix}"
    path.write_bytes(PACKED[suffix](unit * 30 * MB))
    for read in (
        read_text,
        lambda p: list(read_lines(p)),
        lambda p: list(tar_members(p, ("",), MB)),
    ):
        tracemalloc.start()
        with pytest.raises(
            InputError, match=r"unpacks to over 200 times|holds more than|cannot read"
        ):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 40 * MB
        tracemalloc.stop()


def test_a_dictionary_as_large_as_the_address_space(tmp_path: Path) -> None:
    """The header of an .xz may claim four gigabytes: they are not asked for."""
    data = bytearray(lzma.compress(b"text", preset=0))
    size = 4 * (data[12] + 1)
    data[12 + 4] = 40
    struct.pack_into("<I", data, 12 + size - 4, zlib.crc32(bytes(data[12 : 12 + size - 4])))
    (tmp_path / "a.xz").write_bytes(bytes(data))
    assert read_text(tmp_path / "a.xz") == "text"


def test_text_holds_no_nul(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"ab\0c")
    with pytest.raises(InputError, match="is no text: it holds a NUL character at 2"):
        read_text(tmp_path / "a.txt")


def test_a_hole_of_a_terabyte(tmp_path: Path) -> None:
    with (tmp_path / "a.txt").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InputError, match="holds more than"):
        read_text(tmp_path / "a.txt")
    with pytest.raises(InputError, match=r"holds more than|unpacks to"):
        list(read_lines(tmp_path / "a.txt"))


def test_tar_members(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.xz"
    with tarfile.open(path, "w:xz") as archive:
        for name, data in (("a.txt", b"one"), ("b.png", b"no"), ("c/d.md", b"two")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("e.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    assert list(tar_members(path, (".txt", ".md"), MB)) == [("a.txt", b"one"), ("c/d.md", b"two")]
    with pytest.raises(InputError, match="holds more than 600 bytes"):
        list(tar_members(path, (".txt",), 600))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a": 1, "a": 2}', "it names 'a' twice"),
        ("9" * 5000, "is damaged"),
        ("{", "is damaged"),
        ("", "is damaged"),
    ],
)
def test_json_traps(text: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^x {message}|^x is damaged: {message}"):
        parse_json(text, "x")


def bomb(levels: int = 9) -> str:
    """Each list holds ten times the one before."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for i in range(1, levels):
        lines.append(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 20_000, "nested too deeply"),
        ("- " * 20_000, "nested too deeply"),
        (bomb(), "holds more than 20,000 values"),
        ("a: &a {x: 1}\nb: &b {<<: *a}\nc: [*b, *b]\n" + bomb(), "holds more than"),
        ("&a [*a]", "holds more than"),
        ("a: 1\na: 2", "it names 'a' twice"),
        ("a: 2000-99-99", "month must be"),
        ("!!int ''", "is damaged"),
        ("? [1]\n: 2", "unhashable"),
        ("!!python/object:os.system x", "could not determine a constructor"),
        ("a: " + "9" * 5000, "is damaged"),
        ("a: " + "x" * 200_000, "has more than 100,000 characters"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("\t", "is damaged"),
        ("\x01", "is damaged"),
    ],
)
def test_yaml_traps(text: str, message: str) -> None:
    began = time.process_time()
    with pytest.raises(InputError, match=message) as caught:
        parse_yaml(text, "x")
    assert len(str(caught.value)) <= 300
    assert time.process_time() - began < 30  # a bomb would take hours


def test_yaml_that_is_meant() -> None:
    text = "a: &a {x: 1, y: [2, 3]}\nb: {<<: *a, x: 4}\nc: *a\nd:\n"
    found = parse_yaml(text, "x")
    assert found["a"] == found["c"] == {"x": 1, "y": [2, 3]}
    assert found["b"] == {"x": 4, "y": [2, 3]}
    assert found["d"] is None
    assert parse_yaml("", "x") is None
