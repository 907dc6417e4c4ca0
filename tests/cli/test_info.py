"""``rwkvx info`` against models made here: counts, memory, broken files."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rwkvx import Model, ModelConfig
from rwkvx.checkpoint.safetensors import stored_in_safetensors
from rwkvx.cli import main
from rwkvx.costs import state_memory
from rwkvx.errors import InputError
from rwkvx.state import state_bytes

CONFIG = ModelConfig(
    vocab_size=256,
    width=64,
    pattern=("rwkv7", "rwkv7", "sparse", "rwkv7", "sparse"),
    head_size=16,
    chunk_size=8,
    topk=2,
    sparse_kv_heads=2,
    key_conv=4,
    tokenizer="bytes",
)


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return Model(CONFIG).eval()


@pytest.fixture
def folder(model: Model, tmp_path: Path) -> Path:
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    return tmp_path


def run(args: list[str]) -> int:
    with pytest.raises(SystemExit) as status:
        main(["info", *args])
    return int(status.value.code or 0)


def test_info_tells_the_truth(
    model: Model, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([str(folder)]) == 0
    out = capsys.readouterr().out
    assert f"{sum(p.numel() for p in model.parameters()):,}" in out
    assert "2 rwkv7, 1 sparse, 1 rwkv7, 1 sparse" in out
    assert "64, 4 heads of 16" in out
    assert "chunks of 8, top 2, flat selection, 2 kv heads, key convolution of 4" in out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [16, 40])
def test_memory_is_what_a_state_takes(model: Model, tokens: int, dtype: torch.dtype) -> None:
    model = copy.deepcopy(model).to(dtype)
    with torch.no_grad():
        _, state = model(torch.ones(1, tokens, dtype=torch.int64), logits="none")
    memory = state_memory(CONFIG, element=dtype.itemsize)
    assert sum(block.at(tokens) for block in memory) == state_bytes(state)


@pytest.mark.parametrize("cut", [-1, 4, 20])
def test_cut_files_are_refused(folder: Path, cut: int, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    assert run([str(folder)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {file}")
    assert "truncated" in err
    assert err.count("\n") == 1


def test_broken_headers_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    for header in (b"[]", b"{", b'{"a": 1}', b'{"a": {}}', b"\xff\xff"):
        file.write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(InputError, match="damaged safetensors header"):
            stored_in_safetensors(file)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "config.json is damaged"),
        ('{"witdh": 3}', "unknown model key 'witdh'"),
    ],
)
def test_broken_configs_are_refused(
    folder: Path, config: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "config.json").write_text(config)
    assert run([str(folder)]) == 1
    assert message in capsys.readouterr().err


def test_missing_models_are_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["nothing"]) == 1
    assert "no model 'nothing'" in capsys.readouterr().err
    (tmp_path / "a.pth").write_bytes(b"")
    assert run([str(tmp_path / "a.pth")]) == 1
    assert "a.pth is of no known format" in capsys.readouterr().err
    assert run([str(tmp_path)]) == 1
    assert "is no model folder" in capsys.readouterr().err


def test_weights_must_be_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "model.safetensors").unlink()
    assert run([str(folder)]) == 1
    assert "model.safetensors is missing" in capsys.readouterr().err


def test_a_vocabulary_too_small_for_the_tokenizer_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {**CONFIG.to_dict(), "tokenizer": "world"}
    (folder / "config.json").write_text(json.dumps(config))
    assert run([str(folder)]) == 0
    told = capsys.readouterr().out
    assert "256 rows" in told
    assert "'world' has 65536 ids" in told
