"""Our own folder and `rwkvx.load`: exact round trips, and one clear line for every bad file."""

import json
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import rwkvx
from rwkvx import InputError, Model, ModelConfig, files, shipped
from rwkvx.checkpoint.checkpoint import Checkpoint
from rwkvx.checkpoint.folder import save_folder, write
from rwkvx.cli.info import describe
from rwkvx.config import TOKENIZERS
from rwkvx.shipped import shipped_models
from rwkvx.tokenizers import get_tokenizer


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
        "SHA256SUMS", "config.json", "model.safetensors", "modeling_rwkvx.py",
        "tokenizer_config.json",
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
    for module in (import_module("rwkvx.checkpoint.load"), shipped):
        monkeypatch.setattr(module, "MODELS", tmp_path)
    save_folder(small_model(), tmp_path / "mine")
    assert shipped_models() == ["mine"]
    assert rwkvx.load("mine").config == small_model().config
    with pytest.raises(InputError, match=r"no model 'other': .* nor shipped \(mine\)"):
        rwkvx.load("other")


def rewrite_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_tensors_that_do_not_fit_are_named(folder: Path) -> None:
    rewrite_tensors(folder, lambda t: t.update({"blocks.2.att.x": torch.zeros(2)}))
    with pytest.raises(InputError, match=r"no place for: blocks\.2\.att\.x"):
        rwkvx.load(folder)
    rewrite_tensors(folder, lambda t: (t.pop("blocks.2.att.x"), t.pop("ln_out.bias")))  # type: ignore
    with pytest.raises(InputError, match=r"lacks the tensor ln_out\.bias"):
        rwkvx.load(folder)
    rewrite_tensors(folder, lambda t: t.update({"ln_out.bias": torch.zeros(17)}))
    with pytest.raises(InputError, match=r"ln_out\.bias is \[17\], expected \[16\]"):
        rwkvx.load(folder)
    whole = torch.zeros(16, dtype=torch.int64)
    rewrite_tensors(folder, lambda t: t.update({"ln_out.bias": whole}))
    with pytest.raises(InputError, match=r"ln_out\.bias is of torch\.int64, expected floating"):
        rwkvx.load(folder)


def test_a_depth_that_the_pattern_does_not_have(folder: Path) -> None:
    with pytest.raises(InputError, match="holds 3 blocks, the pattern of its config 2"):
        rwkvx.load(folder, pattern=["rwkv7", "rwkv7"])
    with pytest.raises(InputError, match="holds 3 blocks, the pattern of its config 4"):
        rwkvx.load(folder, pattern=["rwkv7"] * 4)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite(folder: Path, value: float) -> None:
    rewrite_tensors(folder, lambda t: t["blocks.1.ffn.key.weight"][3, 2].fill_(value))  # type: ignore
    with pytest.raises(InputError, match=r"blocks\.1\.ffn\.key\.weight holds NaN or infinite"):
        rwkvx.load(folder)


def test_a_vocabulary_that_is_not_the_tokenizers(folder: Path) -> None:
    with pytest.raises(InputError, match=r"emb\.weight has 256 rows, but .*'world' has 65536 ids"):
        rwkvx.load(folder, tokenizer="world")
    assert {name: get_tokenizer(name).vocab_size for name in TOKENIZERS} == TOKENIZERS


@pytest.mark.parametrize("size", [0, 4, 200, -1])
def test_truncated_weights(folder: Path, size: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    said = "empty" if size == 0 else "truncated or damaged"
    with pytest.raises(InputError, match=rf"model\.safetensors is {said}") as caught:
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
    with pytest.raises(InputError, match=r"a\.bin is of no known format"):
        rwkvx.load(tmp_path / "a.bin")


def test_torchs_own_dtypes_and_devices() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = rwkvx.load("passkey-tiny", torch.device("cpu"), dtype)
        assert model.emb.weight.dtype == dtype


def test_bad_dtypes_and_devices(folder: Path) -> None:
    with pytest.raises(InputError, match=r"dtype must be one of .* got 'int4'"):
        rwkvx.load(folder, dtype="int4")
    with pytest.raises(InputError, match="device 'abacus' cannot be used"):
        rwkvx.load(folder, device="abacus")


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond 100 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_old_file(folder: Path) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with (
        full_disk(),
        pytest.raises(OSError, match=r"cannot write .*model\.safetensors: .*too large"),
    ):
        save_folder(small_model(seed=1), folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    with full_disk(), pytest.raises(OSError, match="File too large"):
        files.write_json(folder / "new.json", {"a": "b" * 200})
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))


def test_sums_are_those_of_sha256sum(folder: Path) -> None:
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True)
    assert done.returncode == 0
    files = ("config.json", "model.safetensors", "modeling_rwkvx.py")
    assert done.stdout.decode().splitlines() == [f"{file}: OK" for file in files]


def test_damage_is_found_on_request(folder: Path) -> None:
    rwkvx.load(folder, verify=True)
    flip(folder / "model.safetensors", -1000)
    rwkvx.load(folder)
    with pytest.raises(InputError, match=r"model\.safetensors is damaged or was changed"):
        rwkvx.load(folder, verify=True)
    flip(folder / "model.safetensors", -1000)
    rwkvx.load(folder, verify=True)
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    with pytest.raises(InputError, match=r"config\.json is damaged or was changed"):
        rwkvx.load(folder, verify=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no SHA256SUMS to verify it against"),
        (b"\xff", "SHA256SUMS is damaged"),
        (b"abc model.safetensors\n", "SHA256SUMS is damaged: 'abc model.safetensors'"),
        (b"abc  ../model.safetensors\n", "SHA256SUMS is damaged"),
        (b"abc  other.safetensors\n", r"other\.safetensors is missing"),
        (b"", r"does not name model\.safetensors"),
    ],
)
def test_sums_that_cannot_be_used(folder: Path, content: bytes | None, message: str) -> None:
    if content is None:
        (folder / "SHA256SUMS").unlink()
    else:
        (folder / "SHA256SUMS").write_bytes(content)
    with pytest.raises(InputError, match=message):
        rwkvx.load(folder, verify=True)


@pytest.fixture
def sharded(folder: Path) -> Path:
    """The same model in shards of at most 4 kB, written over the one file."""
    write(Checkpoint.of(small_model()), folder, shard_bytes=4000)
    return folder


def test_shards(sharded: Path) -> None:
    names = sorted(p.name for p in sharded.glob("*.safetensors"))
    assert len(names) > 3
    assert names == [
        f"model-{i:05}-of-{len(names):05}.safetensors" for i in range(1, len(names) + 1)
    ]
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    model = small_model()
    assert index["metadata"]["total_size"] == sum(4 * x.numel() for x in model.parameters())
    assert set(index["weight_map"]) == set(model.state_dict())
    assert rwkvx.load(sharded, verify=True).fingerprint() == model.fingerprint()
    assert f"{sum(x.numel() for x in model.parameters()):,}" in dict(describe(sharded)).values()
    save_folder(model, sharded)
    assert [p.name for p in sharded.glob("*.safetensors*")] == ["model.safetensors"]
    assert rwkvx.load(sharded, verify=True).fingerprint() == model.fingerprint()


def test_shards_that_do_not_fit(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    text, first = index.read_text(), sorted(sharded.glob("*.safetensors"))[0]
    index.write_text(text.replace('"blocks.0.ln1.bias"', '"blocks.0.ln1.bios"'))
    with pytest.raises(InputError, match=r"lacks the tensor blocks\.0\.ln1\.bios, which model"):
        rwkvx.load(sharded)
    for damaged in ("{", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../b"}}', "[]"):
        index.write_text(damaged)
        with pytest.raises(InputError, match=r"index\.json is damaged"):
            rwkvx.load(sharded)
    index.write_text(text)
    first.unlink()
    for read in (rwkvx.load, describe):
        with pytest.raises(InputError, match=rf"{first.name} is missing"):
            read(sharded)


def test_weights_are_mapped_not_copied(folder: Path) -> None:
    """Of a tensor's memory the file is the owner; writing to it does not reach the file."""
    before = (folder / "model.safetensors").read_bytes()
    model = rwkvx.load(folder)
    maps = Path("/proc/self/maps").read_text()
    spans = [line.split()[0].split("-") for line in maps.splitlines() if str(folder) in line]
    for name, x in model.state_dict().items():
        assert any(int(a, 16) <= x.data_ptr() < int(b, 16) for a, b in spans), name
    with torch.no_grad():
        model.head.weight.zero_()
    assert (folder / "model.safetensors").read_bytes() == before


def test_json_is_plain(folder: Path) -> None:
    data = json.loads((folder / "config.json").read_text())
    config = small_model().config
    assert ModelConfig.from_dict({name: data[name] for name in config.to_dict()}) == config
