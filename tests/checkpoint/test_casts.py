"""Finite after every cast: what overflows is named, with the dtype to try."""

from pathlib import Path

import pytest
import torch
from weights import RWKV7, config, random_checkpoint

import rwkvx
from rwkvx import InputError
from rwkvx.checkpoint.checkpoint import Checkpoint
from rwkvx.checkpoint.formats import FORMATS
from rwkvx.cli import main

SHAPE = config(pattern=["rwkv7"] * 2, width=64)
NAME = "blocks.1.ffn.key.weight"


def with_value(value: float, dtype: torch.dtype = torch.float32) -> Checkpoint:
    checkpoint = random_checkpoint(SHAPE).to(dtype)
    checkpoint.tensors[NAME][3, 5] = value
    return checkpoint


TOO_LARGE = [
    (1e5, torch.float32, "float16", "bfloat16 or float32"),
    (-7e4, torch.float32, "float16", "bfloat16 or float32"),
    (1e5, torch.bfloat16, "float16", "bfloat16 or float32"),
    (3.4e38, torch.float32, "bfloat16", "float32"),
    (3.4e38, torch.float32, "int8", "float32"),
    (1e300, torch.float64, "float32", "float64"),
]


@pytest.mark.parametrize("form", ["folder", "pth", "fla"])
@pytest.mark.parametrize(("value", "stored", "asked", "advice"), TOO_LARGE)
def test_loading(
    value: float, stored: torch.dtype, asked: str, advice: str, form: str, tmp_path: Path
) -> None:
    FORMATS[form].write(with_value(value, stored), tmp_path / "m")
    narrow = "bfloat16" if asked == "int8" else asked
    with pytest.raises(InputError, match=rf"{NAME} overflows in {narrow}: try dtype {advice}$"):
        rwkvx.load(tmp_path / "m", dtype=asked)
    wide = {torch.float64: "float64"}.get(stored, "float32")
    assert rwkvx.load(tmp_path / "m", dtype=wide).dtype == getattr(torch, wide)


def test_what_just_fits_loads(tmp_path: Path) -> None:
    FORMATS["folder"].write(with_value(65504.0), tmp_path / "m")
    model = rwkvx.load(tmp_path / "m", dtype="float16")
    assert model.state_dict()[NAME][3, 5] == 65504
    assert all(x.isfinite().all() for x in model.state_dict().values())


def test_converting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is written."""
    FORMATS["pth"].write(with_value(1e5), tmp_path / "m.pth")
    for target in ("a", "a.pth", "a.bin"):
        with pytest.raises(SystemExit) as status:
            main(["convert", str(tmp_path / "m.pth"), str(tmp_path / target), "--dtype", "float16"])
        assert status.value.code == 1
        err = capsys.readouterr().err
        assert f"{NAME} overflows in float16: try dtype bfloat16 or float32" in err
        assert err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["m.pth"]


def test_in_memory() -> None:
    with pytest.raises(InputError, match=rf"the model: {NAME} overflows in float16"):
        with_value(1e5).to(torch.float16)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int8"])
def test_what_was_not_finite_before_is_not_called_an_overflow(dtype: str, tmp_path: Path) -> None:
    FORMATS["folder"].write(with_value(torch.inf), tmp_path / "m")
    with pytest.raises(InputError, match=f"{NAME} holds NaN or infinite values"):
        rwkvx.load(tmp_path / "m", dtype=dtype)


def test_ordinary_weights_load_in_every_dtype(tmp_path: Path) -> None:
    FORMATS["pth"].write(random_checkpoint(RWKV7["heads of 64"]), tmp_path / "m.pth")
    for dtype in ("float32", "bfloat16", "float16", "float64", "int8"):
        assert rwkvx.load(tmp_path / "m.pth", dtype=dtype).config.width == 128
