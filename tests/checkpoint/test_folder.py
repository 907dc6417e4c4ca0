"""Our own folder and `rwkvx.load`: exact round trips, and one clear line for every bad file."""

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import rwkvx
from rwkvx import InputError, Model, ModelConfig
from rwkvx.checkpoint import files
from rwkvx.checkpoint.folder import save_folder
from rwkvx.checkpoint.load import shipped_models


def small_model(seed: int = 0) -> Model:
    config = ModelConfig(
        256, 16, ("rwkv7", "rwkv7", "sparse"), 8, chunk_size=4, topk=2, key_conv=3,
        sparse_kv_heads=1, value_rank=5, tokenizer="bytes",
    )  # fmt: skip
    model = rwkvx.init_weights(Model(config), seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_folder(small_model(), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    model = small_model().to(dtype)
    save_folder(model, tmp_path / "model")
    loaded = rwkvx.load(tmp_path / "model", dtype=str(dtype).removeprefix("torch."))
    assert loaded.config == model.config
    assert not loaded.training
    for name, x in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == dtype
        assert torch.equal(loaded.state_dict()[name], x), name
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids)[0], model(ids)[0])
    assert loaded.fingerprint() == model.fingerprint()
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "config.json", "model.safetensors",
    ]  # fmt: skip


def test_weights_can_be_trained_and_saved_over_their_own_file(folder: Path) -> None:
    model = rwkvx.load(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    save_folder(model, folder)
    expected = small_model().emb.weight + 1
    assert torch.equal(rwkvx.load(folder).emb.weight, expected)


def test_overrides(folder: Path) -> None:
    model = rwkvx.load(folder, chunk_size=8, topk=5)
    assert (model.config.chunk_size, model.config.topk) == (8, 5)
    with pytest.raises(InputError, match="unknown model key 'chunks'"):
        rwkvx.load(folder, chunks=3)
    with pytest.raises(InputError, match=r"key_conv is \[3, 8\], expected \[4, 8\]"):
        rwkvx.load(folder, key_conv=4)


def test_shipped_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in shipped_models():
        assert rwkvx.load(name).config.vocab_size >= 256
    monkeypatch.setattr(import_module("rwkvx.checkpoint.load"), "files", lambda _: tmp_path)
    save_folder(small_model(), tmp_path / "models" / "mine")
    assert shipped_models() == ["mine"]
    assert rwkvx.load("mine").config == small_model().config
    with pytest.raises(InputError, match=r"no model 'other': .* nor shipped \(mine\)"):
        rwkvx.load("other")


def rewrite_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_tensors_that_do_not_fit_are_named(folder: Path) -> None:
    rewrite_tensors(folder, lambda t: t.update({"blocks.9.att.x": torch.zeros(2)}))
    with pytest.raises(InputError, match=r"no place for: blocks\.9\.att\.x"):
        rwkvx.load(folder)
    rewrite_tensors(folder, lambda t: (t.pop("blocks.9.att.x"), t.pop("ln_out.bias")))  # type: ignore
    with pytest.raises(InputError, match=r"lacks the tensor ln_out\.bias"):
        rwkvx.load(folder)
    rewrite_tensors(folder, lambda t: t.update({"ln_out.bias": torch.zeros(17)}))
    with pytest.raises(InputError, match=r"ln_out\.bias is \[17\], expected \[16\]"):
        rwkvx.load(folder)


@pytest.mark.parametrize("size", [0, 4, 200, -1])
def test_truncated_weights(folder: Path, size: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(InputError, match=r"model\.safetensors is truncated or damaged") as caught:
        rwkvx.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged"),
        (b"{", "is damaged"),
        (b"\xff\xfe{}", "is damaged"),
        (b"3", "holds no mapping"),
        (b"[]", "holds no mapping"),
        (b"{}", r"config\.json: the model config lacks"),
        (b'{"depth": 3}', r"config\.json: unknown model key 'depth'"),
    ],
)
def test_damaged_configs(folder: Path, content: bytes, message: str) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        rwkvx.load(folder)
    assert "config.json" in str(caught.value)


def test_missing_files(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors is missing"):
        rwkvx.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"is no model folder: cannot read .*config\.json"):
        rwkvx.load(folder)
    with pytest.raises(InputError, match=r"no model .*nowhere"):
        rwkvx.load(tmp_path / "nowhere")
    (tmp_path / "a.bin").write_bytes(b"x")
    with pytest.raises(InputError, match=r"neither a folder with config\.json nor a \.pth"):
        rwkvx.load(tmp_path / "a.bin")


def test_bad_dtypes_and_devices(folder: Path) -> None:
    with pytest.raises(InputError, match=r"dtype must be one of .* got 'int8'"):
        rwkvx.load(folder, dtype="int8")
    with pytest.raises(InputError, match="device 'abacus' cannot be used"):
        rwkvx.load(folder, device="abacus")


def test_a_full_disk_leaves_the_old_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    plain = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        plain(self, data[:10])
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        save_folder(small_model(seed=1), folder)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_json(folder / "new.json", {})
    assert not (folder / "new.json").exists()


def test_json_is_plain(folder: Path) -> None:
    data = json.loads((folder / "config.json").read_text())
    assert ModelConfig.from_dict(data) == small_model().config
