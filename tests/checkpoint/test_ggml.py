"""Files of rwkv.cpp: the real one comes back byte for byte; damaged and foreign ones are named."""

import hashlib
import os
import struct
from pathlib import Path

import pytest
import torch
from weights import RWKV7, random_checkpoint

import rwkvx
from rwkvx import InputError
from rwkvx.checkpoint import fla, folder, ggml, pth
from rwkvx.cli.info import describe

SHAPE = RWKV7["one block"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    ggml.write(random_checkpoint(SHAPE), tmp_path / "m.bin")
    return tmp_path / "m.bin"


def test_the_real_file_through_every_format(tmp_path: Path) -> None:
    """rwkv.cpp's test model to .pth, to our folder, to fla's and back: the same bytes."""
    data = os.environ.get("RWKVX_DATA")
    path = Path(data or ".") / "rwkv7_tiny_834k" / "tiny-rwkv-7v0-834K-FP32.bin"
    if not data or not path.is_file():
        pytest.skip("RWKVX_DATA names no folder with rwkv7_tiny_834k")
    checkpoint = ggml.read(path, {})
    assert checkpoint.config.ranks == dict.fromkeys("wavg", 32)
    assert checkpoint.config.tokenizer == "bytes"
    for form in (pth, folder, fla, ggml):
        form.write(checkpoint, tmp_path / form.__name__)
        checkpoint = form.read(tmp_path / form.__name__, {})
    digest = hashlib.sha256((tmp_path / ggml.__name__).read_bytes()).hexdigest()
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()


def patch(file: Path, at: int, value: int) -> None:
    content = bytearray(file.read_bytes())
    struct.pack_into("<i", content, at, value)
    file.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (4, 99, "is of version 99"),
        (8, 7, "the vocabulary is 7 by its header, 300 by its tensors"),
        (12, 7, "the width is 7 by its header, 64 by its tensors"),
        (16, 3, "the depth is 3 by its header, 1 by its tensors"),
        (24, 9, "is damaged at byte"),
        (28, 5000, "is damaged at byte"),
        (32, 8, r"emb\.weight is quantised \(Q5_1\)|quantised"),
        (32, 77, "is damaged: emb.weight is of type 77"),
        (36, -3, r"is damaged: emb\.weight"),
        (36, 10**9, r"is truncated in emb\.weight"),
    ],
)
def test_headers_that_do_not_fit(file: Path, at: int, value: int, message: str) -> None:
    patch(file, at, value)
    for read in (rwkvx.load, describe):
        with pytest.raises(InputError, match=message):
            read(file)


@pytest.mark.parametrize("size", [4, 20, 30, 40, 1000, -1])
def test_truncated_files(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])
    for read in (rwkvx.load, describe):
        with pytest.raises(InputError, match=r"m\.bin is truncated"):
            read(file)


def test_missing_tensors_are_named(file: Path) -> None:
    """The last one, left out whole."""
    head = random_checkpoint(SHAPE).tensors["head.weight"]
    length = 12 + 8 + len("head.weight") + 4 * head.numel()
    file.write_bytes(file.read_bytes()[:-length])
    with pytest.raises(InputError, match=r"lacks the tensor head\.weight"):
        rwkvx.load(file)


def test_weights_that_are_not_finite(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:-4] + struct.pack("<f", float("nan")))
    with pytest.raises(InputError, match=r"head\.weight holds NaN"):
        rwkvx.load(file)


def test_there_are_no_checksums(file: Path) -> None:
    with pytest.raises(InputError, match="carry no checksums"):
        rwkvx.load(file, verify=True)
    assert torch.isfinite(rwkvx.load(file).head.weight).all()
