"""Files as they lie around: what is plainly meant is read, anything else named with a way out."""

import codecs
import json
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import SHAPE, rezipped, small, state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

import rwkvx
from rwkvx import InputError
from rwkvx.checkpoint.checkpoint import Checkpoint
from rwkvx.checkpoint.formats import FORMATS
from rwkvx.cli.info import describe

RAW = state_dict()


def loads_as_plain(path: Path) -> bool:
    """Whether a file holds the model of `small()`, bit for bit."""
    describe(path)
    loaded, expected = rwkvx.load(path).state_dict(), small().tensors
    return all(torch.equal(loaded[name], x) for name, x in expected.items())


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {prefix + name: x for name, x in RAW.items()}


MEANT: dict[str, Any] = {
    "state_dict": {"state_dict": RAW, "epoch": 3, "lr": 1e-3},
    "model": {"model": RAW, "optimizer": {"state": {0: {"step": torch.ones(1)}}}},
    "model_state_dict": {"model_state_dict": OrderedDict(RAW), "args": {"a": [1, None, "b"]}},
    "nested": {"state_dict": {"module": RAW}},
    "module.": prefixed("module."),
    "_orig_mod.": prefixed("_orig_mod."),
    "model.": prefixed("model."),
    "several": prefixed("_orig_mod.module.model."),
    "both": {"state_dict": prefixed("model."), "step": torch.tensor(3)},
    "parameters": {name: nn.Parameter(x) for name, x in RAW.items()},
    "not contiguous": {n: x.t().contiguous().t() if x.dim() == 2 else x for n, x in RAW.items()},
    "slices": {n: torch.cat([x, x])[: len(x)] for n, x in RAW.items()},
    "things beside tensors": {**RAW, "epoch": 3, "name": "x", "loss": 0.5},
}


@pytest.mark.parametrize("modern", [True, False])
@pytest.mark.parametrize("name", MEANT)
def test_what_is_plainly_meant(name: str, modern: bool, tmp_path: Path) -> None:
    torch.save(MEANT[name], tmp_path / "m.pth", _use_new_zipfile_serialization=modern)
    assert loads_as_plain(tmp_path / "m.pth")


def test_other_suffixes_and_safetensors(tmp_path: Path) -> None:
    for name in ("m.pt", "m.ckpt", "pytorch_model.bin", "m"):
        torch.save(RAW, tmp_path / name)
        assert loads_as_plain(tmp_path / name)
    save_file(RAW, tmp_path / "m.safetensors")
    assert loads_as_plain(tmp_path / "m.safetensors")
    save_file(prefixed("model."), tmp_path / "n.st")
    assert loads_as_plain(tmp_path / "n.st")


def test_a_file_inside_a_folder_means_the_folder(tmp_path: Path) -> None:
    FORMATS["folder"].write(small(), tmp_path / "m")
    for name in ("model.safetensors", "config.json"):
        assert rwkvx.load(tmp_path / "m" / name).config == SHAPE
    tensors = {f"model.{name}": x for name, x in small().tensors.items()}
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    assert rwkvx.load(tmp_path / "m").config == SHAPE


def test_one_tensor_under_two_names(tmp_path: Path) -> None:
    """Tied weights become two, and can be written again in every format."""
    tied = {**RAW, "head.weight": RAW["emb.weight"]}
    torch.save(tied, tmp_path / "m.pth")
    model = rwkvx.load(tmp_path / "m.pth")
    assert torch.equal(model.head.weight, model.emb.weight)
    assert model.head.weight.data_ptr() != model.emb.weight.data_ptr()
    shared = small()
    shared.tensors["head.weight"] = shared.tensors["emb.weight"]
    for name, form in FORMATS.items():
        form.write(Checkpoint.of(model), tmp_path / name)
        form.write(shared, tmp_path / f"{name}-shared")
        for path in (tmp_path / name, tmp_path / f"{name}-shared"):
            found = rwkvx.load(path)
            assert torch.equal(found.head.weight, found.emb.weight)


@pytest.mark.parametrize("mark", [codecs.BOM_UTF8, b""])
def test_a_byte_order_mark_in_a_config(mark: bytes, tmp_path: Path) -> None:
    FORMATS["folder"].write(small(), tmp_path / "m")
    config = tmp_path / "m" / "config.json"
    config.write_bytes(mark + config.read_bytes())
    assert rwkvx.load(tmp_path / "m").config == SHAPE


def save(value: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        torch.save(value, folder / "m.pth")
        return folder / "m.pth"

    return make


def content(data: bytes, name: str = "m.pth") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


def folder_of(config: Any, **files: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
        for name, data in files.items():
            path = folder / name.replace("__", ".").replace("_in_", "/")
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_bytes(data)
        return folder

    return make


def names(*names: str) -> dict[str, Tensor]:
    return {name: torch.ones(2, 2) for name in ("emb.weight", *names)}


def sparse() -> dict[str, Any]:
    return {**RAW, "emb.weight": RAW["emb.weight"].to_sparse()}


LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64}
ADAPTER = json.dumps({"base_model_name_or_path": "org/base", "peft_type": "LORA"}).encode()
FOREIGN: dict[str, tuple[Callable[[Path], Path], str]] = {
    "RWKV-4": (save(names("blocks.0.att.time_decay", "blocks.0.att.time_first")), "holds RWKV-4"),
    "RWKV-5": (save(names("blocks.0.att.time_first", "blocks.0.att.ln_x.weight")), "holds RWKV-5"),
    "RWKV-5.2": (save(names("blocks.0.att.time_faaaa")), "holds RWKV-5; only RWKV-7 is read"),
    "RWKV-6": (save(names("blocks.0.att.time_maa_x", "blocks.0.att.time_faaaa")), "holds RWKV-6"),
    "HF's RWKV-4": (
        save({"rwkv.blocks.0.attention.time_decay": torch.ones(2)}), "holds RWKV-4"
    ),
    "Llama": (save(names("model.layers.0.self_attn.q_proj.weight")), "holds a Transformer"),
    "LoRA": (
        save({"base_model.model.blocks.0.att.key.lora_A.weight": torch.ones(2)}),
        "holds a LoRA adapter.*merge it",
    ),
    "quantised": (save({"blocks.0.att.key.qweight": torch.ones(2)}), "holds quantised weights"),
    "deep embeddings": (save({**RAW, "blocks.0.ffn.s_emb": torch.ones(2)}), "deep embeddings"),
    "our own names": (save(small().tensors), "by rwkvx's own names: name the folder"),
    "float8": (
        save({n: x.to(torch.float8_e4m3fn) for n, x in RAW.items()}),
        r"emb\.weight is of torch\.float8_e4m3fn, expected floating point of 16, 32 or 64 bits",
    ),
    "int8": (save({n: x.to(torch.int8) for n, x in RAW.items()}), "is of torch.int8"),
    "complex": (save({n: x.to(torch.complex64) for n, x in RAW.items()}), "is of torch.complex64"),
    "sparse": (save(sparse()), "'emb.weight' is a sparse tensor, expected a plain one"),
    "meta": (save({n: x.to("meta") for n, x in RAW.items()}), "is a meta tensor"),
    "a whole model": (
        save(rwkvx.Model(SHAPE)), r"holds code \(rwkvx\.model\.Model\), .*state_dict\(\) alone"
    ),
    "a list": (save([torch.ones(2)]), "does not hold tensors by name"),
    "a plain pickle": (content(pickle.dumps({"a": 1}, 4)), "does not begin as torch.save begins"),
    "GGUF": (content(b"GGUF" + bytes(99)), "it is a GGUF file of llama.cpp: take the .pth"),
    "git lfs": (
        content(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"),
        "a pointer of Git LFS, not the file itself: run `git lfs pull`",
    ),
    "web page": (content(b"<!DOCTYPE html><html>"), "a web page, not the file: download it again"),
    "empty": (content(b""), "it is empty"),
    "zeros": (content(bytes(99)), "it is zeros, not a model: download it again"),
    "gzip": (content(b"\x1f\x8b" + bytes(99)), "compressed by gzip: unpack it first"),
    "HDF5": (content(b"\x89HDF\r\n"), "an HDF5 file of Keras"),
    "JSON": (content(b'{"a": 1}', "other.json"), "it is JSON: name the folder it lies in"),
    "Llama's folder": (
        folder_of(LLAMA, model__safetensors=b""),
        "holds a model of Hugging Face, 'LlamaForCausalLM': use transformers for it",
    ),
    "any folder of HF": (folder_of({"model_type": "mamba2"}), "a model of Hugging Face, 'mamba2'"),
    "RWKV-6's folder": (folder_of({"model_type": "rwkv6"}), "holds RWKV-6; only RWKV-7 is read"),
    "RWKV-4's folder": (
        folder_of({"model_type": "rwkv", "architectures": ["RwkvForCausalLM"]}), "holds RWKV-4"
    ),
    "adapter folder": (
        folder_of(None, adapter_config__json=ADAPTER, adapter_model__safetensors=b""),
        "is no model folder: it is a LoRA adapter of 'org/base': merge it",
    ),
    "GGUF folder": (folder_of(None, a__gguf=b"GGUF"), "a folder of GGUF files"),
    "a folder of .pth": (folder_of(None, a__pth=b""), r"name the file .*a\.pth"),
    "a run": (
        folder_of(None, progress__json=b"{}", model_in_config__json=b"{}"),
        r"a folder around models: name .*/model",
    ),
    "a cache of the hub": (
        folder_of(None, snapshots_in_0a1b_in_config__json=b"{}"),
        r"a folder around models: name .*/snapshots/0a1b",
    ),
    "an empty folder": (folder_of(None), "it is an empty folder"),
    "weights of git lfs": (
        folder_of(SHAPE.to_dict(), model__safetensors=b"version https://git-lfs.github.com/spec/v1\n"),
        "a pointer of Git LFS",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_strangers_are_named(name: str, tmp_path: Path) -> None:
    make, message = FOREIGN[name]
    path = make(tmp_path)
    for read in (rwkvx.load, describe):
        with pytest.raises(InputError, match=message) as caught:
            read(path)
        assert str(tmp_path) in str(caught.value)
        assert len(str(caught.value)) <= 300


def test_float8_in_a_folder_is_no_damaged_header(tmp_path: Path) -> None:
    FORMATS["folder"].write(small(), tmp_path / "m")
    tensors = {n: x.to(torch.float8_e4m3fn) for n, x in small().tensors.items()}
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    for read in (rwkvx.load, describe):
        with pytest.raises(
            InputError, match=r"is of torch\.float8_e4m3fn, expected floating point"
        ):
            read(tmp_path / "m")
    header = b'{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}'
    (tmp_path / "m" / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + b"0"
    )
    with pytest.raises(InputError, match="numbers of the type 'F4' are not read"):
        rwkvx.load(tmp_path / "m")


def test_torchscript_and_other_archives(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "m.pth")
    with pytest.raises(InputError, match="is a TorchScript program: save the model's state_dict"):
        rwkvx.load(tmp_path / "m.pth")
    torch.save(RAW, tmp_path / "n.pth")
    rezipped(tmp_path / "n.pth", lambda name, data: data, method=8)
    with pytest.raises(InputError, match="is compressed inside"):
        rwkvx.load(tmp_path / "n.pth")


def test_a_name_of_the_hub_says_how_to_get_it() -> None:
    with pytest.raises(InputError, match=r"`hf download RWKV/RWKV7-0\.1B --local-dir DIR`"):
        rwkvx.load("RWKV/RWKV7-0.1B")
    with pytest.raises(InputError, match=r"nor shipped \(.*\)$"):
        rwkvx.load("nothing-of-that-name")
