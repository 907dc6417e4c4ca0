"""Text, JSON lines, archives and YAML changed at random: what was meant, or one line."""

import io
import json
import lzma
import random
import tarfile
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from mutation import mutated

from rwkvx.errors import InputError
from rwkvx.files import parse_json, read_json, read_lines, read_text, read_yaml, tar_members
from rwkvx.training.config import read_config

LINES = "\n".join(
    json.dumps({"text": f"line {i} é"}, ensure_ascii=False) for i in range(50)
).encode()
CONFIG = Path(str(files("rwkvx_configs"))) / "passkey_tiny.yaml"


def archive() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:xz", preset=0) as tar:
        for name in ("a.txt", "b.md"):
            member = tarfile.TarInfo(name)
            member.size = len(LINES)
            tar.addfile(member, io.BytesIO(LINES))
    return stream.getvalue()


def rows(path: Path) -> list[Any]:
    return [parse_json(line, path) for line in read_lines(path)]


def members(path: Path) -> list[Any]:
    return list(tar_members(path, (".txt", ".md"), 10**6))


KINDS: dict[str, tuple[bytes, Callable[[Path], object]]] = {
    "a.txt": (LINES, read_text),
    "a.jsonl": (LINES, rows),
    "a.jsonl.xz": (lzma.compress(LINES), rows),
    "a.txt.xz": (lzma.compress(LINES), read_text),
    "a.tar.xz": (archive(), members),
    "a.tar": (lzma.decompress(archive()), members),
    "a.json": (b"[" + LINES.replace(b"\n", b",") + b"]", read_json),
    "a.yaml": (CONFIG.read_bytes(), read_yaml),
    "config.yaml": (CONFIG.read_bytes(), read_config),
}


@pytest.mark.parametrize("name", KINDS)
def test_nothing_but_one_line(name: str, tmp_path: Path, trials: int) -> None:
    content, read = KINDS[name]
    path, draw, said = tmp_path / name, random.Random(name), []
    path.write_bytes(content)
    read(path)
    for _ in range(trials):
        path.write_bytes(mutated(content, draw))
        began = time.process_time()
        try:
            read(path)
        except InputError as error:
            said.append(str(error))
        assert time.process_time() - began < 10
    assert len(said) > trials / 20
    assert all(len(line) <= 300 and line.isprintable() for line in said)
