"""Writing: whole or not at all, nothing left over, the mode that the umask says."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rwkvx.errors import InputError, WriteError
from rwkvx.files import replacing, replacing_folder, write_bytes, write_json, write_text
from rwkvx_evals.files import write_atomically


@contextmanager
def full_disk(size: int = 100) -> Iterator[None]:
    """No file may grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_modes(umask: int, tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", b"x")
    with replacing(tmp_path / "b") as temporary:  # somebody who writes files nobody may read
        temporary.unlink()
        os.close(os.open(temporary, os.O_CREAT, 0o600))
    with replacing_folder(tmp_path / "c") as folder:
        write_text(folder / "d", "x")
    for name in ("a", "b", "c/d"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "c").stat().st_mode & 0o777 == 0o777 & ~umask


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    for error in (OSError(28, "No space left"), RuntimeError("bug"), KeyboardInterrupt()):
        for path in (tmp_path / "a", tmp_path / "new" / "b"):
            with pytest.raises(WriteError if isinstance(error, OSError) else type(error)):
                fail_in(path, error)
    assert names(tmp_path) == ["a", "new"]
    assert (tmp_path / "a").read_text() == "old"


def fail_in(path: Path, error: BaseException) -> None:
    with replacing(path) as temporary:
        temporary.write_text("half")
        raise error


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for write in (
        write_text,
        write_json,
        lambda p, x: write_atomically(p, lambda t: write_text(t, x)),
    ):
        with (
            full_disk(),
            pytest.raises(InputError, match=rf"^cannot write {path}: File too large$"),
        ):
            write(path, "x" * 1000)
        assert not names(tmp_path)


def test_a_folder_comes_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "m"
    with full_disk(), pytest.raises(OSError, match=rf"^cannot write {target}/b: File too large$"):
        fill(target)
    assert not names(tmp_path)
    fill(target)
    assert names(tmp_path) == ["m", "m/a", "m/b"]
    before = (target / "a").read_bytes(), (target / "b").read_bytes()
    with full_disk(), pytest.raises(WriteError, match="File too large"):
        fill(target)
    assert before == ((target / "a").read_bytes(), (target / "b").read_bytes())
    (target / "own").write_text("kept")
    fill(target)
    assert names(target) == ["a", "b", "own"]


def fill(target: Path) -> None:
    with replacing_folder(target) as folder:
        write_text(folder / "a", "small")
        write_text(folder / "b", "x" * 1000)


def test_links_stay(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "file").symlink_to("real/a")
    fill(tmp_path / "link")
    write_text(tmp_path / "file", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").is_symlink()
    assert (tmp_path / "real" / "a").read_text() == "new"


@pytest.mark.parametrize("make", [lambda p: p.parent.mkdir(), lambda p: p.parent.write_text("")])
def test_places_that_cannot_be_written(make, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "a" / "b"
    make(path)
    if path.parent.is_dir():
        path.mkdir()
        (path / "c").write_text("")
    with pytest.raises(InputError, match=f"^cannot write {path}: "):
        write_text(path, "x")
    with pytest.raises(InputError, match=r"^cannot write "):
        fill(Path("/proc/nothing/here"))
    assert [n for n in names(tmp_path) if n not in ("a", "a/b", "a/b/c")] == []


def test_long_names(tmp_path: Path) -> None:
    write_text(tmp_path / ("x" * 250 + ".txt"), "x")
    assert len(names(tmp_path)) == 1


def test_json_of_any_text(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": "é\ud800", "a": 1})
    assert (tmp_path / "a.json").read_text() == '{\n  "b": "é\\ud800",\n  "a": 1\n}\n'
