"""Packages beside which `rwkvx bench cpu` measures: the same weights, the same logits."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import rwkvx
from rwkvx.cli import main
from rwkvx_evals.bench.llama import BLOCK, write_gguf
from rwkvx_evals.bench.peers import MODULES, open_peer
from rwkvx_evals.bench.subjects import random_model

SHAPE: dict[str, Any] = {
    "vocab_size": 70,
    "width": 64,
    "pattern": ["rwkv7", "rwkv7"],
    "tokenizer": "bytes",
}


def rwkv7(**changes: Any) -> rwkvx.Model:
    return random_model(rwkvx.ModelConfig.from_dict(SHAPE | changes))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("peer", ["rwkv", "llama.cpp"])
def test_rwkv7_alone_beside_a_package(
    peer: str,
    dtype: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if any(find_spec(module) is None for module in MODULES[peer].values()):
        pytest.skip(f"{peer} is not installed")
    monkeypatch.setenv("RWKV_JIT_ON", "0")  # compiling takes longer than the test
    shape, out = tmp_path / "tiny.yaml", tmp_path / "out"
    shape.write_text(yaml.safe_dump({"model": SHAPE}))
    arguments = ["--model", str(shape), "--out", str(out), "--lengths", "9", "--decode", "2"]
    arguments += ["--repeats", "1", "--dtype", dtype, "--peer-dtype", "float32"]
    with pytest.raises(SystemExit) as status:
        main(["bench", "cpu", "--threads", "1", "--peer", peer, *arguments])
    assert not status.value.code, capsys.readouterr().err
    results = json.loads((out / "results.json").read_text())
    assert results["peer"]["words"].startswith(f"{peer} ")
    assert "peer / ours" in results["decode"][0]["ratios"]
    difference = results["prefill"][0]["peer_difference"]
    exact = dtype == "float32"
    assert difference < (2e-5 if exact else 0.1)
    assert exact or difference > 1e-4  # the peer's weights were not rounded to int8


@pytest.mark.parametrize(("name", "size"), [("float32", 4), ("bfloat16", 2)])
def test_gguf_has_every_weight(name: str, size: int, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    model, path = rwkv7(), tmp_path / "model.gguf"
    write_gguf(model, path, name)
    reader = gguf.GGUFReader(path)
    found = {x.name: x for x in reader.tensors}
    own = model.state_dict()
    # Six mixes are one tensor; v0 to v2 of the first block stand in for what it has not.
    assert len(found) == len(own) - 5 * len(model.blocks) + 3
    assert sum(x.n_elements for x in found.values()) == sum(x.numel() for x in own.values()) + sum(
        found[f"blk.0.time_mix_a{i}.weight"].n_elements for i in "012"
    )
    matrix = found["blk.1.time_mix_key.weight"]
    assert matrix.n_bytes == size * matrix.n_elements
    factor = torch.tensor(found["blk.1.time_mix_w1.weight"].data)
    assert torch.equal(factor, own["blocks.1.att.w1"].t())
    lerp = torch.tensor(found["blk.1.time_mix_lerp_fused.weight"].data).view(6, -1)
    assert torch.equal(lerp[4], own["blocks.1.att.x_a"])
    assert {f"blk.1.{x}.weight" for x in BLOCK.values()} <= set(found)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("none", {}, "rwkv: not asked for"),
        ("rwkv", {"head_size": 32}, "rwkv: knows heads of 64 only, not of 32"),
        ("llama.cpp", {"pattern": ["rwkv7", "sparse"]}, "other blocks than RWKV-7"),
        ("llama.cpp", {"group_norm_eps": 1e-5}, "a group norm eps of 1e-05"),
    ],
)
def test_what_a_peer_cannot_hold_is_said(
    name: str, changes: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rwkvx_evals.bench.peers.find_spec", lambda module: object())
    peer, said = open_peer(rwkv7(**changes), "float32", name)
    assert peer is None
    assert words in said


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rwkvx_evals.bench.peers.find_spec", lambda module: None)
    said = [open_peer(rwkv7(), "float32", name)[1] for name in ("auto", "llama.cpp")]
    assert "rwkv: not installed (pip install 'rwkvx[peers]')" in said
    assert "llama.cpp: not installed (pip install 'rwkvx[llama]')" in said
