"""The two `.pth` layouts, from files put together here by hand; hostile and damaged files."""

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import rwkvx
from rwkvx import InputError
from rwkvx.cli.info import describe

WIDTH, HEADS, SIZE, VOCAB, INNER = 16, 2, 8, 50, 64
RANKS = {"w": 6, "a": 7, "v": 5, "g": 9}


def layer_norm(name: str) -> dict[str, Tensor]:
    return {f"{name}.weight": torch.randn(WIDTH), f"{name}.bias": torch.randn(WIDTH)}


def channel_mix(name: str) -> dict[str, Tensor]:
    return {
        f"{name}.x_k": torch.randn(1, 1, WIDTH),
        f"{name}.key.weight": torch.randn(INNER, WIDTH),
        f"{name}.value.weight": torch.randn(WIDTH, INNER),
    }


def published(rwkv_blocks: int = 4, sparse_blocks: int = 2) -> dict[str, Tensor]:
    """Tensors by their published names: vectors [1, 1, C], a value residual in block 0 too."""
    torch.manual_seed(0)
    raw = {
        "rwkv.emb.weight": torch.randn(VOCAB, WIDTH),
        "rwkv.head.weight": torch.randn(VOCAB, WIDTH),
    }
    raw |= layer_norm("rwkv.ln_out") | layer_norm("rwkv.blocks.0.ln0")
    for i in range(rwkv_blocks):
        block, att = f"rwkv.blocks.{i}", f"rwkv.blocks.{i}.att"
        raw |= layer_norm(f"{block}.ln1") | layer_norm(f"{block}.ln2") | channel_mix(f"{block}.ffn")
        for x in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "v0", "k_k", "k_a"):
            raw[f"{att}.{x}"] = torch.randn(1, 1, WIDTH)
        for x, rank in RANKS.items():
            raw[f"{att}.{x}1"], raw[f"{att}.{x}2"] = (
                torch.randn(WIDTH, rank),
                torch.randn(rank, WIDTH),
            )
        raw[f"{att}.r_k"] = torch.randn(HEADS, SIZE)
        for x in ("receptance", "key", "value", "output"):
            raw[f"{att}.{x}.weight"] = torch.randn(WIDTH, WIDTH)
        raw |= layer_norm(f"{att}.ln_x")
    for j in range(sparse_blocks):
        block = f"moba.{j}"
        raw |= layer_norm(f"{block}.ln1") | layer_norm(f"{block}.ln2") | channel_mix(f"{block}.ffn")
        for x in ("receptance", "key", "value", "output"):
            raw[f"{block}.att.{x}.weight"] = torch.randn(WIDTH, WIDTH)
    return raw


def blinkdl(blocks: int = 4) -> dict[str, Tensor]:
    """The same for pure RWKV-7: no prefix."""
    raw = {n: x for n, x in published(blocks).items() if not n.startswith("moba.")}
    return {name.removeprefix("rwkv."): x for name, x in raw.items()}


def write(path: Path, raw: dict[str, Tensor]) -> Path:
    torch.save(raw, path)
    return path


def test_every_tensor_finds_its_place(tmp_path: Path) -> None:
    raw = published()
    model = rwkvx.load(write(tmp_path / "m.pth", raw))
    config = model.config
    assert config.pattern == ("rwkv7", "rwkv7", "sparse") * 2
    assert (config.chunk_size, config.topk, config.head_size) == (2048, 3, SIZE)
    assert (config.width, config.vocab_size, config.ffn_mult) == (WIDTH, VOCAB, 4)
    assert config.ranks == RANKS
    tensors = model.state_dict()
    places = {"rwkv": (0, 1, 3, 4), "moba": (2, 5)}
    unused = {f"rwkv.blocks.0.att.v{i}" for i in range(3)}
    seen = set()
    for name, x in raw.items():
        if name in unused:
            continue
        part, *rest = name.split(".")
        if part == "moba":
            ours = f"blocks.{places['moba'][int(rest[0])]}.{'.'.join(rest[1:])}"
        elif rest[0] == "blocks" and rest[2] != "ln0":
            ours = f"blocks.{places['rwkv'][int(rest[1])]}.{'.'.join(rest[2:])}"
        else:
            ours = ".".join(rest[2:] if rest[0] == "blocks" else rest)
        assert torch.equal(tensors[ours], x.view(tensors[ours].shape)), name
        seen.add(ours)
    assert seen == set(tensors)
    logits, _ = model(torch.arange(20)[None])
    assert logits is not None
    assert logits.isfinite().all()


def test_every_tensor_of_pure_rwkv7_finds_its_place(tmp_path: Path) -> None:
    raw = blinkdl()
    model = rwkvx.load(write(tmp_path / "m.pth", raw))
    assert model.config.pattern == ("rwkv7",) * 4
    assert model.config.ranks == RANKS
    tensors = model.state_dict()
    for name, x in raw.items():
        ours = name.removeprefix("blocks.0.") if ".ln0." in name else name
        if ours not in (f"blocks.0.att.v{i}" for i in range(3)):
            found = tensors.pop(ours)
            assert torch.equal(found, x.view(found.shape)), name
    assert not tensors


def test_files_from_before_torch_1_6(tmp_path: Path) -> None:
    torch.save(blinkdl(), tmp_path / "m.pth", _use_new_zipfile_serialization=False)
    assert rwkvx.load(tmp_path / "m.pth").config.ranks == RANKS
    with pytest.raises(InputError, match=r"m\.pth carries no checksums"):
        rwkvx.load(tmp_path / "m.pth", verify=True)


def test_vectors_may_be_stored_flat(tmp_path: Path) -> None:
    raw = {name: x.flatten() if x.dim() == 3 else x for name, x in blinkdl().items()}
    flat, deep = write(tmp_path / "flat.pth", raw), write(tmp_path / "deep.pth", blinkdl())
    assert rwkvx.load(flat).fingerprint() == rwkvx.load(deep).fingerprint()


def test_tokenizer_by_vocabulary(tmp_path: Path) -> None:
    for rows, tokenizer in ((50, None), (256, "bytes"), (65536, "world")):
        raw = blinkdl(1)
        raw["emb.weight"], raw["head.weight"] = torch.ones(2, rows, WIDTH).unbind()
        assert rwkvx.load(write(tmp_path / "m.pth", raw)).config.tokenizer == tokenizer
    with pytest.raises(InputError, match=r"emb\.weight has 50 rows, but .*'world' has 65536"):
        rwkvx.load(write(tmp_path / "m.pth", blinkdl(1)), tokenizer="world")
    with pytest.raises(InputError, match="names no tokenizer"):
        _ = rwkvx.load(tmp_path / "m.pth").tokenizer


def test_an_explicit_pattern(tmp_path: Path) -> None:
    pattern = ["rwkv7", "sparse", "rwkv7", "rwkv7", "sparse"]
    path = write(tmp_path / "m.pth", published(3, 2))
    with pytest.raises(InputError, match=r"m\.pth: 3 rwkv7 blocks cannot be spread evenly"):
        rwkvx.load(path)
    model = rwkvx.load(path, pattern=pattern)
    assert model.config.pattern == tuple(pattern)
    raw = torch.load(path, weights_only=True)
    assert torch.equal(model.blocks[4].att.key.weight, raw["moba.1.att.key.weight"])
    assert torch.equal(model.blocks[3].att.key.weight, raw["rwkv.blocks.2.att.key.weight"])
    with pytest.raises(
        InputError, match="holds 3 rwkv7 and 2 sparse blocks, the pattern 2 rwkv7 and 2"
    ):
        rwkvx.load(path, pattern=pattern[:3] + pattern[4:])


def test_chunk_size_and_topk_are_told(tmp_path: Path) -> None:
    model = rwkvx.load(write(tmp_path / "m.pth", published()), chunk_size=64, topk=5)
    assert (model.config.chunk_size, model.config.topk) == (64, 5)


def test_block_0_need_not_have_a_value_residual(tmp_path: Path) -> None:
    raw = {n: x for n, x in published().items() if not n.startswith("rwkv.blocks.0.att.v")}
    raw |= {n: x for n, x in published().items() if n == "rwkv.blocks.0.att.value.weight"}
    rwkvx.load(write(tmp_path / "m.pth", raw))
    rwkvx.load(write(tmp_path / "one.pth", published(1, 1)))


def test_bfloat16_files(tmp_path: Path) -> None:
    raw = {n: x.bfloat16() for n, x in published().items()}
    path = write(tmp_path / "m.pth", raw)
    assert rwkvx.load(path).dtype == torch.float32
    assert rwkvx.load(path, dtype="bfloat16").dtype == torch.bfloat16


MISTAKES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (
        lambda r: r.pop("rwkv.blocks.2.att.w0"),
        r"lacks the tensor rwkv\.blocks\.2\.att\.w0",
    ),
    "missing size": (lambda r: r.pop("rwkv.blocks.0.att.g1"), r"lacks .*rwkv\.blocks\.0\.att\.g1"),
    "extra": (lambda r: r.update({"moba.0.att.bias": torch.ones(1)}), r"no place for: .*att\.bias"),
    "shape": (
        lambda r: r.update({"rwkv.ln_out.weight": torch.ones(17)}),
        r"ln_out\.weight is \[17\], expected \[16\]",
    ),
    "deep shape": (
        lambda r: r.update({"moba.1.ffn.x_k": torch.ones(1, 1, 17)}),
        r"moba\.1\.ffn\.x_k is \[1, 1, 17\], expected \[1, 1, 16\]",
    ),
    "NaN": (
        lambda r: r["moba.1.att.key.weight"][3].fill_(torch.nan),
        r"5\.att\.key\.weight holds NaN",
    ),
    "infinite": (
        lambda r: r["rwkv.head.weight"][9, 9].fill_(torch.inf),
        r"head\.weight holds NaN or in",
    ),
    "inner width": (
        lambda r: r.update({"rwkv.blocks.0.ffn.key.weight": torch.ones(65, 16)}),
        r"rwkv\.blocks\.0\.ffn\.key\.weight has 65 rows, which is no multiple of the width 16",
    ),
    "vector": (
        lambda r: r.update({"rwkv.emb.weight": torch.ones(17)}),
        r"rwkv\.emb\.weight is \[17\], expected a matrix",
    ),
    "uneven": (
        lambda r: [r.pop(n) for n in list(r) if n.startswith("rwkv.blocks.3.")],
        "3 rwkv7 blocks cannot be spread evenly before 2",
    ),
    "a hole": (
        lambda r: [r.pop(n) for n in list(r) if n.startswith(("rwkv.blocks.1.", "moba.0."))],
        r"lacks the block rwkv\.blocks\.1",
    ),
    "another model": (
        lambda r: [r.pop(n) for n in list(r) if "emb" in n],
        "does not hold an RWKV-7 or RWKV-X model",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, mistake: str) -> None:
    change, message = MISTAKES[mistake]
    raw = published()
    change(raw)
    with pytest.raises(InputError, match=message) as caught:
        rwkvx.load(write(tmp_path / "m.pth", raw))
    assert "\n" not in str(caught.value)


class Hostile:
    """Writes a file when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("modern", [True, False])
def test_code_in_a_file_is_not_executed(tmp_path: Path, modern: bool) -> None:
    mark, path = tmp_path / "executed", tmp_path / "m.pth"
    raw: dict = {**published(), "more": Hostile(mark)}
    if modern:
        torch.save(raw, path)
    else:
        path.write_bytes(pickle.dumps(raw["more"], protocol=2))
    for read in (rwkvx.load, describe):
        with pytest.raises(
            InputError, match=r"holds code \(\w+\.mkdir\).*nothing .*executed"
        ) as said:
            read(path)
        assert "\n" not in str(said.value)
    assert not mark.exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_code_in_pickles_of_any_protocol_is_not_executed(tmp_path: Path, protocol: int) -> None:
    mark, path = tmp_path / "executed", tmp_path / "m.pth"
    path.write_bytes(pickle.dumps(Hostile(mark), protocol=protocol))
    with pytest.raises(
        InputError, match=r"holds code \(posix\.mkdir\).* nothing of it was executed"
    ):
        rwkvx.load(path)
    assert not mark.exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("modern", [True, False])
def test_files_of_any_protocol(tmp_path: Path, protocol: int, modern: bool) -> None:
    path, zipped = tmp_path / "m.pth", {"_use_new_zipfile_serialization": modern}
    torch.save(published(), path, pickle_protocol=protocol, **zipped)
    assert rwkvx.load(path).config.ranks == RANKS


@pytest.mark.parametrize("modern", [True, False])
@pytest.mark.parametrize("size", [0, 10, 1000, -100, -1])
def test_truncated_files(tmp_path: Path, size: int, modern: bool) -> None:
    path = tmp_path / "m.pth"
    torch.save(published(), path, _use_new_zipfile_serialization=modern)
    path.write_bytes(path.read_bytes()[:size])
    for read in (rwkvx.load, describe) if modern else (rwkvx.load,):
        with pytest.raises(InputError, match=r"m\.pth ") as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_a_flipped_bit_is_found_on_request(tmp_path: Path) -> None:
    raw = published()
    path = write(tmp_path / "m.pth", raw)
    rwkvx.load(path, verify=True)
    content = path.read_bytes()
    at = content.index(raw["moba.1.att.value.weight"].numpy().tobytes())
    path.write_bytes(content[: at + 8] + bytes([content[at + 8] ^ 4]) + content[at + 9 :])
    rwkvx.load(path)
    with pytest.raises(InputError, match=r"m\.pth is damaged: the CRC-32 of its part m/data/\d+"):
        rwkvx.load(path, verify=True)


def test_other_content(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    for content in (3, [torch.ones(2)], {"a": 3}, {3: torch.ones(2)}):
        torch.save(content, path)
        with pytest.raises(InputError, match=r"m\.pth does not hold"):
            rwkvx.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(InputError, match=r"m\.pth"):
        rwkvx.load(path)
    path.write_text("a text file, not weights")
    with pytest.raises(InputError, match=r"m\.pth"):
        rwkvx.load(path)
