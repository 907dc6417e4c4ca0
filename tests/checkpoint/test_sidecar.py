"""What a format has no place for: said, kept beside the file, found again, noticed if stale."""

import json
import os
from pathlib import Path

import pytest
import torch
from weights import config, random_checkpoint, random_ids

import rwkvx
from rwkvx import InputError
from rwkvx.checkpoint.formats import FORMATS
from rwkvx.cli import main
from rwkvx.cli.info import describe

R, S = "rwkv7", "sparse"
PURE = {"pattern": [R, R], "width": 64}
BYTES = {"vocab_size": 256}
LOST = [
    ("pth", {"chunk_size": 16}),
    ("pth", {"topk": 7}),
    ("pth", {"selection": "coarse_to_fine"}),
    ("pth", {"pattern": [S, R]}),
    ("pth", {"pattern": [R, S, S, R, R]}),
    ("pth", {"group_norm_eps": 1e-3}),
    ("pth", {**BYTES, "tokenizer": None}),
    ("pth", {"vocab_size": 300, "tokenizer": "bytes"}),
    ("pth", {"chunk_size": 8, "topk": 2, "group_norm_eps": 1e-4, "pattern": [S, R, R]}),
    ("pth", {**PURE, "group_norm_eps": 1e-3}),
    ("ggml", {**PURE, "group_norm_eps": 1e-3}),
    ("ggml", {**PURE, "vocab_size": 300, "tokenizer": "bytes"}),
    ("fla", {**PURE, "group_norm_eps": 1e-3}),
    ("fla", {**PURE, **BYTES, "tokenizer": None}),
    ("fla", {**PURE, "head_size": 16}),
]


@pytest.mark.parametrize(("name", "changes"), LOST)
def test_a_file_reads_back_as_the_same_function(
    name: str, changes: dict[str, object], tmp_path: Path
) -> None:
    before = random_checkpoint(config(**{"width": 64, "chunk_size": 2048, "topk": 3, **changes}))
    path, ids = tmp_path / "m", random_ids(60, 256)[None]
    note = FORMATS[name].write(before, path)
    assert note is not None
    changed = set(changes) - set(PURE) - set(BYTES) | (
        {"pattern"} if S in changes.get("pattern", ()) else set()
    )  # type: ignore[operator]
    for field in changed - {"head_size"}:
        assert f"{field}=" in note
    assert f"rwkvx.load('{path}', " in note
    sidecar = path / "rwkvx.json" if path.is_dir() else tmp_path / "m.json"
    assert str(sidecar) in dict(describe(path))["told by"]
    after = rwkvx.load(path)
    for field, value in before.config.to_dict().items():
        if not field.endswith("rank"):
            assert after.config.to_dict()[field] == value, field
    with torch.inference_mode():
        assert torch.equal(after(ids)[0], before.model()(ids)[0])
    assert rwkvx.load(path, chunk_size=9).config.chunk_size == 9
    sidecar.unlink()
    with pytest.raises((InputError, AssertionError)):
        assert rwkvx.load(path).config == after.config


@pytest.mark.parametrize("name", ["pth", "fla", "ggml", "folder"])
def test_nothing_is_said_where_nothing_is_lost(name: str, tmp_path: Path) -> None:
    """Fields of sparse blocks change nothing without any."""
    shape = config(**PURE, chunk_size=5, topk=9, selection="coarse_to_fine")
    assert FORMATS[name].write(random_checkpoint(shape), tmp_path / "m") is None
    assert not list(tmp_path.rglob("*rwkvx.json")) + list(tmp_path.glob("*.json"))


def hybrid(tmp_path: Path, seed: int = 1) -> Path:
    checkpoint = random_checkpoint(config(width=64))
    checkpoint.tensors["emb.weight"] += seed
    FORMATS["pth"].write(checkpoint, tmp_path / f"{seed}.pth")
    return tmp_path / f"{seed}.pth"


def test_a_sidecar_of_another_file_is_noticed(tmp_path: Path) -> None:
    """Of the same size: other weights; and of another size."""
    first, second = hybrid(tmp_path, 1), hybrid(tmp_path, 2)
    assert first.stat().st_size == second.stat().st_size
    assert rwkvx.load(first).config.chunk_size == 16
    os.replace(second, first)
    for read in (rwkvx.load, describe):
        with pytest.raises(InputError, match=r"1\.pth\.json tells of another 1\.pth .* remove it"):
            read(first)
    first.write_bytes(first.read_bytes() + b"\0")
    with pytest.raises(InputError, match=r"1\.pth\.json tells of another"):
        rwkvx.load(first)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged"),
        ('{"config": 3, "belongs_to": 3}', "holds no fields of a model"),
        ('{"config": {"depth": 3}, "belongs_to": 3}', "holds no fields of a model"),
        ('{"config": {}, "belongs_to": []}', "tells of another"),
        ("[" * 50_000, "is damaged: nested too deeply"),
        ("x" * 200_000, "has more than 100,000 bytes"),
    ],
)
def test_damaged_sidecars(content: str, message: str, tmp_path: Path) -> None:
    path = hybrid(tmp_path)
    (tmp_path / "1.pth.json").write_text(content)
    with pytest.raises(InputError, match=message):
        rwkvx.load(path)


def test_values_in_a_sidecar_have_the_same_ranges(tmp_path: Path) -> None:
    path, sidecar = hybrid(tmp_path), tmp_path / "1.pth.json"
    data = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps({**data, "config": {"topk": 10**18}}))
    with pytest.raises(InputError, match="topk must be a whole number"):
        rwkvx.load(path)


def test_somebody_elses_file_of_that_name_is_left_alone(tmp_path: Path) -> None:
    path = hybrid(tmp_path)
    (tmp_path / "1.pth.json").write_text('{"downloaded": "yesterday"}')
    assert rwkvx.load(path).config.chunk_size == 2048


def test_the_command_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    FORMATS["folder"].write(random_checkpoint(config(width=64)), tmp_path / "m")
    with pytest.raises(SystemExit) as status:
        main(["convert", str(tmp_path / "m"), str(tmp_path / "m.pth")])
    err = capsys.readouterr().err
    assert status.value.code == 0
    assert err.startswith("note: ")
    assert "chunk_size=16" in err
    assert err.count("\n") == 1
    with pytest.raises(SystemExit):
        main(["convert", str(tmp_path / "m.pth"), str(tmp_path / "again")])
    assert rwkvx.load(tmp_path / "again").config.chunk_size == 16
