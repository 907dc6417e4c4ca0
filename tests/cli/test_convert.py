"""``rwkvx convert`` from the command line."""

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import rwkvx
from rwkvx.checkpoint import pth
from rwkvx.checkpoint.checkpoint import Checkpoint
from rwkvx.cli import main
from rwkvx.errors import WriteError

CONFIG = rwkvx.ModelConfig(
    256, 64, ("rwkv7",) * 4, 64, decay_rank=8, iclr_rank=8, value_rank=8, gate_rank=8,
    tokenizer="bytes",
)  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> Path:
    model = rwkvx.init_weights(rwkvx.Model(CONFIG))
    with torch.no_grad():
        for x in model.parameters():
            x += 0.1 * torch.randn_like(x)
    pth.write(Checkpoint.of(model).to(torch.bfloat16), tmp_path / "source.pth")
    return tmp_path / "source.pth"


def convert(*args: str | Path) -> int:
    with pytest.raises(SystemExit) as status:
        main(["convert", *map(str, args)])
    return int(status.value.code or 0)


def test_there_and_back(source: Path, tmp_path: Path) -> None:
    before = torch.load(source, weights_only=True)
    steps = (("a", ()), ("b.pth", ()), ("c", ("--to", "fla")), ("d.pth", ()))
    for name, options in steps:
        assert convert(source, tmp_path / name, *options) == 0
        source = tmp_path / name
    assert json.loads((tmp_path / "c" / "config.json").read_text())["model_type"] == "rwkv7"
    after = torch.load(tmp_path / "d.pth", weights_only=True)
    assert after.keys() == before.keys()
    for name, x in before.items():
        assert after[name].dtype == torch.bfloat16
        assert torch.equal(after[name], x), name


def test_dtype(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(source, tmp_path / "a.bin") == 1
    assert "no place for bfloat16" in capsys.readouterr().err
    assert convert(source, tmp_path / "a.bin", "--dtype", "float32") == 0
    expected = rwkvx.load(source).state_dict()
    for name, x in rwkvx.load(tmp_path / "a.bin").state_dict().items():
        assert torch.equal(x, expected[name])


def test_expand(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--expand", "2", "--chunk-size", "8", "--topk", "5")
    assert convert(source, tmp_path / "zero", *options) == 0
    assert "the function is that of SOURCE" in capsys.readouterr().out
    zero = rwkvx.load(tmp_path / "zero")
    assert zero.config.pattern == ("rwkv7", "rwkv7", "sparse") * 2
    assert (zero.config.chunk_size, zero.config.topk) == (8, 5)
    ids = torch.arange(60)[None]
    with torch.inference_mode():
        assert torch.equal(zero(ids)[0], rwkvx.load(source)(ids)[0])
    assert convert(source, tmp_path / "copy.pth", *options, "--init", "copy") == 0
    raw = torch.load(tmp_path / "copy.pth", weights_only=True)
    assert torch.equal(raw["moba.1.att.key.weight"], raw["rwkv.blocks.3.att.key.weight"])
    assert "checked" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("source.pth", "out", "--expand", "3"), "4 rwkv7 blocks cannot be spread evenly"),
        (("source.pth", "source.pth"), "source.pth exists already"),
        (("nothing", "out"), "no model 'nothing'"),
        (("source.pth", "out.safetensors"), "files of .safetensors are not written"),
        (("source.pth", "out", "--to", "gguf"), "'gguf' is not one of"),
        (
            ("source.pth", "out", "--topk", "1" + "0" * 18),
            "must be a whole number from 1 to 1048576",
        ),
        (("source.pth", "out", "--expand", "0"), "must be a whole number from 1"),
        (("source.pth", ""), "exists already"),
        (("", "out"), "'' is no name of a file or folder"),
        (("~nobody-here/x", "out"), "there is no such home folder"),
    ],
)
def test_mistakes(
    args: tuple[str, ...],
    message: str,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(source.parent)
    content = source.read_bytes()
    assert convert(*args) != 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert [p.name for p in source.parent.iterdir()] == ["source.pth"]
    assert source.read_bytes() == content


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [100, 10_000])
@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("a", ()),
        ("a.pth", ()),
        ("a.bin", ("--dtype", "float32")),
        ("a", ("--to", "fla")),
        ("new/a", ()),
        ("a.pth", ("--expand", "2", "--chunk-size", "8")),
    ],
)
def test_a_full_disk(
    target: str,
    options: tuple[str, ...],
    size: int,
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line that names the file, nothing left over, and the same command works afterwards."""
    with full_disk(size):
        assert convert(source, tmp_path / target, *options) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: cannot write {tmp_path / target}")
    assert err.count("\n") == 1
    assert [p.name for p in tmp_path.rglob("*") if p.name != "new"] == ["source.pth"]
    assert convert(source, tmp_path / target, *options) == 0
    assert rwkvx.load(tmp_path / target).config.width == 64


def test_a_sidecar_that_does_not_fit_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it the file would be read as another model."""

    def refuse(path: Path, value: object) -> None:
        raise WriteError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr("rwkvx.checkpoint.sidecar.write_json", refuse)
    options = ("--expand", "2", "--chunk-size", "8")
    assert convert(source, tmp_path / "a.pth", *options) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["source.pth"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_have_the_mode_that_the_umask_says(source: Path, tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        convert(source, tmp_path / "a")
        convert(source, tmp_path / "b.pth")
    finally:
        os.umask(before)
    for path in (*(tmp_path / "a").iterdir(), tmp_path / "b.pth"):
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path


def test_verify(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(source, tmp_path / "a", "--verify") == 0
    weights = tmp_path / "a" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x11")
    assert convert(tmp_path / "a", tmp_path / "b", "--verify") == 1
    assert "model.safetensors is damaged or was changed" in capsys.readouterr().err
