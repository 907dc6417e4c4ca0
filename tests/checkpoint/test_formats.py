"""Every format: bit-exact round trips, detection by content, shapes without reading weights."""

import json
import struct
from pathlib import Path

import pytest
import torch
from weights import HYBRID, RWKV7, config, random_checkpoint, same, told

import rwkvx
from rwkvx import InputError
from rwkvx.checkpoint import fla, folder, ggml, pth
from rwkvx.checkpoint.checkpoint import Checkpoint, parameter_shapes
from rwkvx.checkpoint.formats import FORMATS, Format, detect, format_of_target
from rwkvx.checkpoint.load import read_checkpoint
from rwkvx.cli.info import describe

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def round_trip(checkpoint: Checkpoint, form: Format, path: Path) -> Checkpoint:
    form.write(checkpoint, path)
    assert detect(path) is form
    return read_checkpoint(path, told(checkpoint.config))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RWKV7)
def test_rwkv7_goes_through_files_bit_for_bit(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    shape = RWKV7[name]
    before = random_checkpoint(shape, dtype)
    ranks = before.config.ranks
    for form in (folder, pth):
        found = round_trip(before, form, tmp_path / form.__name__)
        assert found.config.ranks == ranks
        assert same(found._replace(config=shape), before)
        assert found.config.group_norm_eps == 64e-5
        before = found._replace(config=shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", HYBRID)
def test_hybrids_go_through_files_bit_for_bit(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    before = random_checkpoint(HYBRID[name], dtype)
    for form in (folder, pth):
        found = round_trip(before, form, tmp_path / form.__name__)
        assert found.config.pattern == before.config.pattern
        assert same(found._replace(config=before.config), before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [16, 32, 64, 128])
def test_fla_folders_bit_for_bit(heads: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """Its group norm goes with the head size; RWKV-7's number is the one at heads of 64."""
    eps = 64e-5 if heads == 64 else heads * 1e-5
    shape = config(width=256, pattern=["rwkv7"] * 3, head_size=heads, group_norm_eps=eps)
    before = random_checkpoint(shape, dtype)
    found = round_trip(before, fla, tmp_path / "hf")
    assert same(found._replace(config=shape), before)
    assert found.config.group_norm_eps == eps
    assert found.config.ranks == shape.ranks


def test_ggml_files_bit_for_bit(tmp_path: Path) -> None:
    for name, shape in RWKV7.items():
        before = random_checkpoint(shape)
        found = round_trip(before, ggml, tmp_path / f"{name}.bin")
        assert same(found._replace(config=shape), before)


def test_ggml_files_of_fp16_keep_vectors_in_float32(tmp_path: Path) -> None:
    """As rwkv.cpp's converter writes them; a second trip changes nothing more."""
    half = random_checkpoint(RWKV7["heads of 64"], torch.float16)
    found = round_trip(half, ggml, tmp_path / "a.bin")
    for name, x in found.tensors.items():
        matrix = x.dim() == 2 and not name.endswith("r_k")
        assert x.dtype == (torch.float16 if matrix else torch.float32), name
        assert torch.equal(x, half.tensors[name].to(x.dtype)), name
    assert same(round_trip(found, ggml, tmp_path / "b.bin"), found)
    with pytest.raises(InputError, match=r"no place for bfloat16 \(emb.weight\): add --dtype"):
        ggml.write(half.to(torch.bfloat16), tmp_path / "c.bin")
    assert not (tmp_path / "c.bin").exists()


def test_dtypes_may_differ_within_a_file(tmp_path: Path) -> None:
    before = random_checkpoint(config(pattern=["rwkv7"] * 2), torch.bfloat16)
    before.tensors["blocks.0.att.w0"] = before.tensors["blocks.0.att.w0"].float() + 1e-6
    for name, form in FORMATS.items():
        if name != "ggml":
            found = round_trip(before, form, tmp_path / name)
            assert same(found._replace(config=before.config), before)


@pytest.mark.parametrize("name", FORMATS)
def test_shapes_are_read_without_weights(name: str, tmp_path: Path) -> None:
    dtype = torch.float32 if name == "ggml" else torch.bfloat16
    checkpoint = random_checkpoint(RWKV7["heads of 64"], dtype)
    FORMATS[name].write(checkpoint, tmp_path / "a")
    seen, read = (FORMATS[name].read(tmp_path / "a", {}, meta) for meta in (True, False))
    assert seen.config == read.config
    assert list(seen.tensors) == list(read.tensors)
    for tensor, x in seen.tensors.items():
        assert x.device.type == "meta"
        assert (x.dtype, x.shape) == (read.tensors[tensor].dtype, read.tensors[tensor].shape)


@pytest.mark.parametrize("name", FORMATS)
def test_what_goes_out_comes_in_as_the_same_function(name: str, tmp_path: Path) -> None:
    shape = RWKV7["heads of 64"]
    checkpoint, ids = random_checkpoint(shape), torch.arange(50)[None]
    FORMATS[name].write(checkpoint, tmp_path / "a")
    with torch.inference_mode():
        assert torch.equal(rwkvx.load(tmp_path / "a")(ids)[0], checkpoint.model()(ids)[0])


def test_targets_mean_formats() -> None:
    for target, form in {
        "a": folder, "a.b/c-0.2B": folder, "a.pth": pth, "b/a.bin": ggml
    }.items():  # fmt: skip
        assert format_of_target(Path(target)) is form
    assert format_of_target(Path("a.pth"), "fla") is fla
    with pytest.raises(InputError, match=r"a\.safetensors: files of \.safetensors are not written"):
        format_of_target(Path("a.safetensors"))


@pytest.mark.parametrize("content", [b"", b"x", b"hello, this is text", b"{}", b"GGUF" + bytes(99)])
def test_unknown_files(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.pth is of no known format") as caught:
        rwkvx.load(tmp_path / "a.pth")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["fla", "ggml"])
def test_formats_of_pure_rwkv7_refuse_hybrids(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no place for sparse blocks"):
        FORMATS[name].write(random_checkpoint(config(width=64)), tmp_path / "a")
    assert not list(tmp_path.iterdir())


WIDE = config(vocab_size=2**24, width=8192, pattern=["rwkv7"])  # an embedding of 550 GB


def test_info_of_a_folder_larger_than_any_memory(tmp_path: Path) -> None:
    """A file with a hole in place of the numbers."""
    header, end = {}, 0
    for name, shape in parameter_shapes(WIDE).items():
        begin, end = end, end + 4 * shape.numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (tmp_path / "config.json").write_text(json.dumps(WIDE.to_dict()))
    rows = dict(describe(tmp_path))
    assert rows["weights"].endswith("GiB, float32")
    assert int(rows["parameters"].replace(",", "")) * 4 == end > 10**12
    with pytest.raises(
        InputError, match=r"in bfloat16 takes [\d,.]+ GB, this machine has [\d.]+ GB"
    ):
        rwkvx.load(tmp_path, dtype="bfloat16")


def test_info_of_a_ggml_file_reads_no_weights(tmp_path: Path) -> None:
    """Eight gigabytes of holes."""
    vocab = 2**24
    hole = 4 * vocab * 64
    small = config(vocab_size=2, width=64, pattern=["rwkv7"])
    ggml.write(random_checkpoint(small), tmp_path / "small.bin")
    content = (tmp_path / "small.bin").read_bytes()
    first, last = content.index(b"emb.weight"), content.index(b"head.weight")
    dims, rows = struct.pack("<2i", 64, 2), struct.pack("<2i", 64, vocab)
    middle = content[first + len("emb.weight") + 2 * 64 * 4 : last].replace(dims, rows)
    with (tmp_path / "m.bin").open("wb") as file:
        file.write(content[:8] + struct.pack("<i", vocab) + content[12 : first - 8])
        file.write(rows + b"emb.weight")
        file.seek(hole, 1)
        file.write(middle + b"head.weight")
        file.truncate(file.tell() + hole)
    assert dict(describe(tmp_path / "m.bin"))["vocabulary"] == "16777216, tokenizer unknown"
