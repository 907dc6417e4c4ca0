"""RWKV-X files: the same logits as the published package, and what the layout cannot hold."""

import contextlib
import io
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor
from weights import HYBRID, config, error, random_checkpoint, random_ids, random_model, told

import rwkvx
from rwkvx.checkpoint import pth
from rwkvx.checkpoint.checkpoint import Checkpoint
from rwkvx.equations import Equations

if TYPE_CHECKING:
    from rwkv_x.model import RWKV_X

TOLERANCE = 1e-5  # of the norm of the logits, float32
needs_package = pytest.mark.skipif(
    find_spec("rwkv_x") is None, reason="rwkv-x is not installed: pip install 'rwkvx[peers]'"
)


def published(path: Path) -> "RWKV_X":
    from rwkv_x.model import RWKV_X

    with contextlib.redirect_stdout(io.StringIO()):
        return RWKV_X(str(path), "cpu fp32")


def prefill(model: "RWKV_X", ids: Tensor) -> tuple[Tensor, dict]:
    """Logits [T, V] of its first prefill call, and its state."""
    return model.forward(ids.tolist(), None, full_output=True)


@needs_package
@pytest.mark.parametrize("name", HYBRID)
def test_prefill_agrees_with_the_published_package(name: str, tmp_path: Path) -> None:
    shape, path = HYBRID[name], tmp_path / "model.pth"
    pth.write(random_checkpoint(shape), path)
    model, package = rwkvx.load(path, **told(shape)), published(path)
    longest = min(shape.topk * shape.chunk_size, 200)
    for tokens in sorted({2, shape.chunk_size + 1, longest} & set(range(longest + 1))):
        ids = random_ids(tokens, shape.vocab_size)
        expected, _ = prefill(package, ids)
        with torch.inference_mode():
            found, _ = model(ids[None])
            last, _ = model(ids[None], logits="last")
        assert error(found[0], expected) <= TOLERANCE
        assert error(last[0, 0], expected[-1]) <= TOLERANCE


@needs_package
def test_where_the_package_leaves_the_trained_model(tmp_path: Path) -> None:
    """It decodes with an attention that does not see new tokens, and forgets a first prompt.

    Three ways of reading the same tokens are one function; the equations say which.
    """
    shape, path = HYBRID["4 + 2 blocks"], tmp_path / "model.pth"
    model = random_model(shape)
    pth.write(Checkpoint.of(model), path)
    loaded, package = rwkvx.load(path, **told(shape)), published(path)
    ids = random_ids(40, shape.vocab_size)
    parameters = {n: x.double().numpy() for n, x in model.state_dict().items()}
    exact = torch.from_numpy(Equations(shape, parameters).logits(ids.tolist()))

    whole, _ = prefill(package, ids)
    _, state = prefill(package, ids[:30])
    pieces, _ = package.forward(ids[30:].tolist(), state, full_output=True)
    _, state = prefill(package, ids[:30])
    for token in ids[30:].tolist():
        decoded, state = package.forward(token, state)
    assert error(whole, exact) <= TOLERANCE
    assert error(pieces, exact[30:]) > 100 * TOLERANCE
    assert error(decoded, exact[-1]) > 100 * TOLERANCE

    with torch.inference_mode():
        _, state = loaded(ids[None, :30])
        pieces, _ = loaded(ids[None, 30:], state)
        for token in ids[30:]:
            decoded, state = loaded(token.view(1, 1), state)
    assert error(pieces[0], exact[30:]) <= TOLERANCE
    assert error(decoded[0, 0], exact[-1]) <= TOLERANCE


@pytest.mark.parametrize("name", HYBRID)
def test_writing_and_reading_a_file_gives_the_same_model(name: str, tmp_path: Path) -> None:
    shape = HYBRID[name]
    model, path = random_model(shape), tmp_path / "model.pth"
    pth.write(Checkpoint.of(model), path)
    raw = torch.load(path, weights_only=True)
    read = rwkvx.load(path)
    # The layout has no place for chunk sizes other than the released ones.
    files = {"model.pth"} if name == "released chunks" else {"model.pth", "model.pth.json"}
    assert {p.name for p in tmp_path.iterdir()} == files
    assert (read.config.chunk_size, read.config.topk) == (shape.chunk_size, shape.topk)
    assert raw["rwkv.blocks.0.att.x_r"].shape == (1, 1, shape.width)
    assert raw["rwkv.blocks.0.ln0.weight"].shape == (shape.width,)
    assert all(x.abs().min() > 0 for x in raw.values())
    assert read.state_dict().keys() == model.state_dict().keys()
    for tensor, x in model.state_dict().items():
        assert torch.equal(read.state_dict()[tensor], x), tensor


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"pattern": ["sparse"]}, "a model without rwkv7 blocks"),
        ({"key_conv": 4}, "a key convolution"),
        ({"sparse_kv_heads": 1}, "grouped-query heads"),
    ],
)
def test_what_the_layout_cannot_hold(
    changes: dict[str, object], missing: str, tmp_path: Path
) -> None:
    with pytest.raises(rwkvx.InputError, match=f"no place for {missing}"):
        pth.write(Checkpoint.of(rwkvx.Model(config(**changes))), tmp_path / "model.pth")
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "model.pth").mkdir()
    with pytest.raises(OSError, match=r"model\.pth"):
        pth.write(random_checkpoint(config(width=64)), tmp_path / "model.pth")
    assert [p.name for p in tmp_path.iterdir()] == ["model.pth"]
