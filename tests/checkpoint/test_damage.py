"""Bytes changed at random: a model comes out, or one line that names the file; nothing else."""

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hostile import SHAPE, small, state_dict
from mutation import mutated
from weights import config, random_checkpoint

import rwkvx
from rwkvx import InputError
from rwkvx.checkpoint.folder import write as write_folder
from rwkvx.checkpoint.formats import FORMATS
from rwkvx.cli.info import describe

SECONDS = 10  # of the processor, for one input


def checked(path: Path) -> None:
    rwkvx.load(path, verify=True)


def written(name: str) -> Callable[[Path], object]:
    return lambda path: FORMATS[name].write(small(), path)


def legacy(path: Path) -> None:
    torch.save(state_dict(), path, _use_new_zipfile_serialization=False)


def inside(path: Path) -> None:
    torch.save({"state_dict": state_dict(), "epoch": 3, "args": {"lr": [1e-3, None]}}, path)


def sharded(path: Path) -> None:
    write_folder(small(), path, shard_bytes=40_000)


def with_sidecar(path: Path) -> None:
    shape = config(width=64, chunk_size=8, ffn_mult=1, vocab_size=30, decay_rank=2, iclr_rank=2)
    FORMATS["pth"].write(random_checkpoint(shape), path / "m.pth")


def torch_folder(path: Path) -> None:
    FORMATS["fla"].write(small(), path)
    tensors = FORMATS["fla"].FLA.write(small())  # type: ignore[attr-defined]
    (path / "model.safetensors").unlink()
    torch.save(tensors, path / "pytorch_model.bin")


# What is written, the files in it that are changed, and what is read.
KINDS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "safetensors": (written("folder"), "model.safetensors", ""),
    "config": (written("folder"), "config.json", ""),
    "sums": (written("folder"), "SHA256SUMS", ""),
    "index": (sharded, "*.index.json", ""),
    "shards": (sharded, "*.safetensors", ""),
    "fla": (written("fla"), "[cm]*", ""),
    "torch in a folder": (torch_folder, "pytorch_model.bin", ""),
    "pth": (written("pth"), "", ""),
    "pth of before": (legacy, "", ""),
    "checkpoint": (inside, "", ""),
    "sidecar": (with_sidecar, "m.pth.json", "m.pth"),
    "hybrid": (with_sidecar, "m.pth", "m.pth"),
    "ggml": (written("ggml"), "", ""),
}


@pytest.mark.parametrize("kind", KINDS)
def test_damage_never_ends_in_a_crash(kind: str, tmp_path: Path, trials: int) -> None:
    write, changed, read = KINDS[kind]
    whole = tmp_path / "model"
    if read:
        whole.mkdir()
    write(whole)
    parts = sorted(whole.glob(changed)) if changed else [whole]
    target, draw, said = whole / read, random.Random(kind), []
    for _ in range(trials):
        part = draw.choice(parts)
        content = part.read_bytes()
        part.unlink()  # what is mapped stays as it is
        part.write_bytes(mutated(content, draw))
        for attempt in (rwkvx.load, describe, checked):
            began = time.process_time()
            try:
                attempt(target)
            except InputError as error:
                said.append(str(error))
            assert time.process_time() - began < SECONDS
        part.unlink()
        part.write_bytes(content)
    assert len(said) > trials / 4
    for line in said:
        assert str(tmp_path) in line
        assert len(line) <= 300
        assert line.isprintable()
    assert rwkvx.load(target).config.width == SHAPE.width
