"""Hugging Face folders of flash-linear-attention: names as fla gives them, old and odd files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from weights import config, random_checkpoint

import rwkvx
from rwkvx import InputError
from rwkvx.checkpoint import fla
from rwkvx.checkpoint.shards import remove_other_weights, write_weights
from rwkvx.cli.info import describe

SHAPE = config(
    pattern=["rwkv7"] * 2, width=128, decay_rank=24, iclr_rank=40, value_rank=16, gate_rank=48
)
C, RANKS = 128, {"w": 24, "a": 40, "v": 16, "g": 48}


def published() -> dict[str, list[int]]:
    """Names and shapes as `fla.models.rwkv7` 0.6.0 makes them, written down from its source."""
    shapes = {
        "model.embeddings.weight": [300, C],
        "model.layers.0.pre_norm.weight": [C],
        "model.layers.0.pre_norm.bias": [C],
        "model.norm.weight": [C],
        "model.norm.bias": [C],
        "lm_head.weight": [300, C],
    }
    for layer in ("model.layers.0", "model.layers.1"):
        for norm in ("attn_norm", "ffn_norm", "attn.g_norm"):
            shapes |= {f"{layer}.{norm}.weight": [C], f"{layer}.{norm}.bias": [C]}
        shapes |= {f"{layer}.attn.x_{m}": [1, 1, C] for m in "rwkvag"}
        shapes |= {f"{layer}.attn.{m}_proj.weight": [C, C] for m in "rkvo"}
        shapes |= {f"{layer}.attn.k_k": [C], f"{layer}.attn.k_a": [C], f"{layer}.attn.r_k": [2, 64]}
        shapes |= {f"{layer}.ffn.x_k": [C], f"{layer}.ffn.key.weight": [4 * C, C]}
        shapes[f"{layer}.ffn.value.weight"] = [C, 4 * C]
        for m, rank in RANKS.items():
            if m != "v" or layer.endswith("1"):
                shapes[f"{layer}.attn.{m}_lora.lora.0.weight"] = [rank, C]
                shapes[f"{layer}.attn.{m}_lora.lora.2.weight"] = [C, rank]
                if m != "g":
                    shapes[f"{layer}.attn.{m}_lora.lora.2.bias"] = [C]
    return shapes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fla.write(random_checkpoint(SHAPE), tmp_path / "hf")
    return tmp_path / "hf"


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_config(folder: Path, **changes: object) -> None:
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, **changes}))


def test_names_and_shapes_are_flas(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    assert {name: list(x.shape) for name, x in tensors.items()} == published()
    data = json.loads((folder / "config.json").read_text())
    assert data["model_type"] == "rwkv7"
    for name, rank in RANKS.items():
        key = {"w": "decay", "a": "a", "v": "v", "g": "gate"}[name]
        assert data[f"{key}_low_rank_dim"] == rank


def test_older_files_pack_the_mixes(folder: Path) -> None:
    before = rwkvx.load(folder).fingerprint()

    def pack(tensors: dict[str, Tensor]) -> None:
        for layer in ("model.layers.0", "model.layers.1"):
            rows = [tensors.pop(f"{layer}.attn.x_{m}").flatten() for m in "rwkvag"]
            tensors[f"{layer}.attn.x_x"] = torch.stack(rows)

    change_tensors(folder, pack)
    assert rwkvx.load(folder).fingerprint() == before
    assert dict(describe(folder))["rwkv7 blocks"] == "low ranks w 24, a 40, v 16, g 48"


def test_block_0_may_carry_a_value_residual(folder: Path) -> None:
    before = rwkvx.load(folder).fingerprint()
    name = "model.layers.0.attn.v_lora.lora.0.weight"
    change_tensors(folder, lambda t: t.update({name: torch.ones(16, C)}))
    assert rwkvx.load(folder).fingerprint() == before


def test_tied_embeddings_become_two(folder: Path) -> None:
    change_tensors(folder, lambda t: t.pop("lm_head.weight"))
    with pytest.raises(InputError, match=r"lacks the tensor lm_head\.weight"):
        rwkvx.load(folder)
    change_config(folder, tie_word_embeddings=True)
    model = rwkvx.load(folder)
    assert torch.equal(model.head.weight, model.emb.weight)
    assert model.head.weight.data_ptr() != model.emb.weight.data_ptr()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn": {"layers": [1]}}, "has attention layers of fla's own"),
        ({"norm_eps": 1e-6}, "norm_eps is 1e-06, RWKV-7 has 1e-05"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu', RWKV-7 has 'sqrelu'"),
        ({"num_hidden_layers": 3}, r"holds 2 blocks, its config\.json tells of 3"),
    ],
)
def test_configs_that_are_no_plain_rwkv7(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    change_config(folder, **changes)
    for read in (rwkvx.load, describe):
        with pytest.raises(InputError, match=message):
            read(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.layers.1.attn.w_lora.lora.2.bias"),
            r"lacks .*w_lora\.lora\.2\.bias",
        ),
        (
            lambda t: t.pop("model.layers.0.attn.r_k"),
            r"lacks the tensor model\.layers\.0\.attn\.r_k",
        ),
        (lambda t: t.update({"model.more": torch.ones(1)}), r"no place for: model\.more"),
        (
            lambda t: t.update({"model.layers.1.attn.g_lora.lora.0.weight": torch.ones(C, 48)}),
            r"1\.attn\.g_lora\.lora\.0\.weight is \[128, 48\], expected \[48, 128\]",
        ),
        (
            lambda t: [t.pop(n) for n in list(t) if ".layers.0." in n],
            r"lacks the block model\.layers\.0",
        ),
        (lambda t: [t.pop(n) for n in list(t) if "layers" in n], r"holds no rwkv7 block"),
        (lambda t: t["lm_head.weight"][0].fill_(torch.nan), r"head\.weight holds NaN"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    folder: Path, change: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    change_tensors(folder, change)
    with pytest.raises(InputError, match=message) as caught:
        rwkvx.load(folder)
    assert "\n" not in str(caught.value)


def test_shards(folder: Path) -> None:
    """As the hub cuts a large model; a shard that is missing or cut short is named."""
    whole = rwkvx.load(folder).fingerprint()
    rows = dict(describe(folder))
    names = write_weights(folder, load_file(folder / "model.safetensors"), shard_bytes=200_000)
    remove_other_weights(folder, names)
    shards = [name for name in names if name.endswith(".safetensors")]
    assert len(shards) > 2
    assert not (folder / "model.safetensors").exists()
    assert rwkvx.load(folder).fingerprint() == whole
    assert dict(describe(folder)) == rows
    content = (folder / shards[1]).read_bytes()
    (folder / shards[1]).write_bytes(content[:-1])
    for read in (rwkvx.load, describe):
        with pytest.raises(InputError, match=rf"{shards[1]} .*truncated"):
            read(folder)
    (folder / shards[1]).unlink()
    for read in (rwkvx.load, describe):
        with pytest.raises(InputError, match=rf"{shards[1]} is missing"):
            read(folder)


def test_folders_without_sums_or_weights(folder: Path) -> None:
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(InputError, match="has no SHA256SUMS to verify it against"):
        rwkvx.load(folder, verify=True)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors is missing"):
        rwkvx.load(folder)


def test_folders_with_the_weights_of_torch(folder: Path) -> None:
    """As Hugging Face wrote them before safetensors: whole, then in two shards with an index."""
    before, tensors = rwkvx.load(folder).fingerprint(), load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert rwkvx.load(folder).fingerprint() == before
    assert rwkvx.load(folder / "pytorch_model.bin").fingerprint() == before
    (folder / "pytorch_model.bin").unlink()
    names = {n: f"pytorch_model-{1 + ('.1.' in n)}.bin" for n in tensors}
    for file in set(names.values()):
        torch.save({n: x for n, x in tensors.items() if names[n] == file}, folder / file)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    assert rwkvx.load(folder).fingerprint() == rwkvx.load(index).fingerprint() == before
    assert dict(describe(folder))["rwkv7 blocks"] == "low ranks w 24, a 40, v 16, g 48"
