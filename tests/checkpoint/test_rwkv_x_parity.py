"""RWKV-X files: the same logits as the published package, and what the layout cannot hold."""

import contextlib
import io
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

import rwkvx
from rwkvx.checkpoint.rwkvx_pth import write_pth

PACKAGE = "rwkv_x"
# Float32 rounding through a dozen blocks, relative to the largest logit.
TOLERANCE = 2e-5


def random_model(config: rwkvx.ModelConfig) -> rwkvx.Model:
    """Initial weights plus noise in every tensor: nothing is zero, and no gate is at rest."""
    model = rwkvx.init_weights(rwkvx.Model(config), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, x in model.named_parameters():
            matrix = x.dim() == 2 and not name.endswith(("r_k", "emb.weight"))
            scale = 0.5 / x.shape[-1] ** 0.5 if matrix else 0.3
            x += scale * torch.randn(x.shape, generator=generator)
    return model.eval()


def config(**changes: object) -> rwkvx.ModelConfig:
    base = {
        "vocab_size": 300,
        "width": 128,
        "pattern": list(rwkvx.hybrid_pattern(4, 2)),
        "chunk_size": 16,
        "topk": 3,
        "tokenizer": "bytes",
    }
    return rwkvx.ModelConfig.from_dict({**base, **changes})


def published_logits(path: Path, ids: Tensor) -> Tensor:
    """Logits [T, V] of the package's first prefill call."""
    from rwkv_x.model import RWKV_X

    with contextlib.redirect_stdout(io.StringIO()):
        model = RWKV_X(str(path), "cpu fp32")
    logits, _ = model.forward(ids.tolist(), None, full_output=True)
    return logits


SHAPES = {
    "4 + 2 blocks": config(),
    "one sparse block": config(pattern=list(rwkvx.hybrid_pattern(3, 1)), width=64),
    "one of each": config(pattern=["rwkv7", "sparse"], width=192, chunk_size=7, topk=5),
    "no sparse block": config(pattern=["rwkv7"] * 3),
    "own low ranks": config(decay_rank=24, iclr_rank=40, value_rank=16, gate_rank=48),
    "12 + 4 blocks": config(pattern=list(rwkvx.hybrid_pattern(12, 4)), width=64, chunk_size=64),
    "released chunks": config(chunk_size=2048, topk=3),
}


@pytest.mark.skipif(
    find_spec(PACKAGE) is None, reason="rwkv-x is not installed: pip install 'rwkvx[peers]'"
)
@pytest.mark.parametrize("name", SHAPES)
def test_prefill_agrees_with_the_published_package(name: str, tmp_path: Path) -> None:
    shape = SHAPES[name]
    path = tmp_path / "model.pth"
    write_pth(random_model(shape), path)
    model = rwkvx.load(path, chunk_size=shape.chunk_size, topk=shape.topk)
    longest = min(shape.topk * shape.chunk_size, 200)
    generator = torch.Generator().manual_seed(3)
    for tokens in sorted({2, shape.chunk_size + 1, longest} & set(range(longest + 1))):
        ids = torch.randint(shape.vocab_size, (tokens,), generator=generator)
        expected = published_logits(path, ids)
        with torch.inference_mode():
            found, _ = model(ids[None])
            last, _ = model(ids[None], logits="last")
        limit = TOLERANCE * expected.abs().max()
        assert (found[0] - expected).abs().max() <= limit
        assert (last[0, 0] - expected[-1]).abs().max() <= limit


@pytest.mark.parametrize("name", SHAPES)
def test_writing_and_reading_a_file_gives_the_same_model(name: str, tmp_path: Path) -> None:
    shape = SHAPES[name]
    model, path = random_model(shape), tmp_path / "model.pth"
    write_pth(model, path)
    raw = torch.load(path, weights_only=True)
    read = rwkvx.load(path, chunk_size=shape.chunk_size, topk=shape.topk, tokenizer="bytes")
    assert [p.name for p in tmp_path.iterdir()] == ["model.pth"]
    assert raw["rwkv.blocks.0.att.x_r"].shape == (1, 1, shape.width)
    assert raw["rwkv.blocks.0.ln0.weight"].shape == (shape.width,)
    assert all(x.abs().min() > 0 for x in raw.values())
    assert read.state_dict().keys() == model.state_dict().keys()
    for tensor, x in model.state_dict().items():
        assert torch.equal(read.state_dict()[tensor], x), tensor


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"pattern": ["sparse", "rwkv7"]}, "this order of blocks"),
        ({"pattern": ["rwkv7", "sparse", "sparse"]}, "this order of blocks"),
        ({"pattern": ["sparse"]}, "a model without RWKV-7 blocks"),
        ({"key_conv": 4}, "a key convolution"),
        ({"sparse_kv_heads": 1}, "grouped-query heads"),
    ],
)
def test_what_the_layout_cannot_hold(
    changes: dict[str, object], missing: str, tmp_path: Path
) -> None:
    with pytest.raises(rwkvx.InputError, match=f"no place for {missing}"):
        write_pth(rwkvx.Model(config(**changes)), tmp_path / "model.pth")
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "model.pth").mkdir()
    with pytest.raises(OSError, match=r"model\.pth"):
        write_pth(random_model(config(width=64)), tmp_path / "model.pth")
    assert [p.name for p in tmp_path.iterdir()] == ["model.pth"]
