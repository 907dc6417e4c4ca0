"""`rwkvx bench load`: a checkpoint is not held twice while it loads."""

import json
import os
from pathlib import Path

import pytest
import torch
import yaml

import rwkvx
from rwkvx.checkpoint.checkpoint import Checkpoint
from rwkvx.checkpoint.formats import FORMATS
from rwkvx.cli import main
from rwkvx_evals.bench.load import measure_load

# An embedding and a head of 33.5 MB each, the largest tensors as in real checkpoints.
SHAPE = {"vocab_size": 65536, "width": 128, "pattern": ["rwkv7", "rwkv7"], "tokenizer": "world"}
LIMIT = 1.15

pytestmark = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="no /proc to read peak memory from"
)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    model = rwkvx.Model(rwkvx.ModelConfig.from_dict(SHAPE))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for x in model.parameters():
            x.uniform_(-1, 1, generator=draw)
    return Checkpoint.of(model)


@pytest.mark.parametrize("name", FORMATS)
def test_peak_memory_over_size(name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    FORMATS[name].write(checkpoint, tmp_path / "model")
    found = measure_load(tmp_path / "model", "float32")
    assert found["size"] >= sum(4 * x.numel() for x in checkpoint.tensors.values())
    assert 0.95 < found["ratio"] <= LIMIT
    if name in ("folder", "pth"):  # mapped; what little is private does not grow with the file
        assert found["mapped"] >= 0.95 * found["size"]
        assert found["private"] < 0.1 * found["size"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = {**SHAPE, "vocab_size": 256, "width": 64, "tokenizer": "bytes"}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({"model": shape}))
    options = ["--model", str(tmp_path / "small.yaml"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as status:
        main(["bench", "load", *options, "--formats", "ggml"])
    assert not status.value.code
    assert "ggml, float32 as float32" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert row["ratio"] == row["peak"] / row["size"]
    assert f"**{row['ratio']:.2f}**" in (tmp_path / "out" / "report.md").read_text()
    mistakes = {"--formats": ("gguf", "no format 'gguf'"), "--model": ("x", "no shape 'x'")}
    for option, (value, message) in mistakes.items():
        with pytest.raises(SystemExit) as status:
            main(["bench", "load", *options, option, value])
        assert status.value.code == 1
        assert message in capsys.readouterr().err
