"""The numbers of others, from the files they read: rwkv, rwkv7-hf, and rwkv.cpp's golden logits.

What differs from a peer is settled by the float64 equations of the model tests, which share
nothing with the package. (rwkv-x has a file of its own.)
"""

import contextlib
import io
import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from weights import RWKV7, config, error, random_checkpoint, random_ids, random_model

import rwkvx
from rwkvx.checkpoint import fla, pth
from rwkvx.checkpoint.checkpoint import Checkpoint
from rwkvx.equations import Equations

TOLERANCE = 1e-5  # of the norm of the logits, float32
TOKENS, DECODED = 60, 6


def needs(package: str) -> pytest.MarkDecorator:
    name = package.replace("-", "_")
    reason = f"{package} is not installed: pip install 'rwkvx[peers]'"
    return pytest.mark.skipif(find_spec(name) is None, reason=reason)


def our_logits(model: rwkvx.Model, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        logits, _ = model(ids[None])
    return logits[0]


def exact_logits(model: rwkvx.Model, ids: Tensor) -> Tensor:
    parameters = {n: x.double().numpy() for n, x in model.state_dict().items()}
    return torch.from_numpy(Equations(model.config, parameters).logits(ids.tolist()))


def rwkv_logits(path: Path, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the package rwkv: all of one prefill, and those of decoding the last tokens."""
    os.environ["RWKV_V7_ON"] = "1"
    os.environ["RWKV_JIT_ON"] = "0"  # compiling takes longer than the test
    with contextlib.redirect_stdout(io.StringIO()):
        from rwkv.model import RWKV

        model = RWKV(str(path.with_suffix("")), "cpu fp32")
    prefill, _ = model.forward(ids.tolist(), None, full_output=True)
    _, state = model.forward(ids[:-DECODED].tolist(), None)
    decoded = []
    for token in ids[-DECODED:].tolist():
        logits, state = model.forward(token, state)
        decoded.append(logits)
    return prefill, torch.stack(decoded)


@needs("rwkv")
@pytest.mark.parametrize("name", RWKV7)
def test_prefill_and_decode_of_rwkv(name: str, tmp_path: Path) -> None:
    shape, path = RWKV7[name], tmp_path / "model.pth"
    pth.write(random_checkpoint(shape), path)
    model, ids = rwkvx.load(path), random_ids(TOKENS, shape.vocab_size)
    prefill, decoded = rwkv_logits(path, ids)
    ours = our_logits(model, ids)
    assert error(ours, prefill) <= TOLERANCE
    assert error(ours[-DECODED:], decoded) <= TOLERANCE
    with torch.inference_mode():
        _, state = model(ids[None, :-DECODED])
        for i, token in enumerate(ids[-DECODED:]):
            logits, state = model(token.view(1, 1), state)
            assert error(logits[0, 0], decoded[i]) <= TOLERANCE


def hf_model(folder: Path) -> torch.nn.Module:
    from rwkv7_hf import RWKV7ForCausalLM

    model, info = RWKV7ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def hf_convert(source: Path, target: Path) -> None:
    from rwkv7_hf.converter import main

    with contextlib.redirect_stdout(io.StringIO()):
        main(["--input", str(source), "--output", str(target), "--precision", "fp32"])


@needs("rwkv7-hf")
@pytest.mark.parametrize("name", ["heads of 64", "one block", "deep", "own ranks"])
def test_folders_that_we_write_for_hugging_face(name: str, tmp_path: Path) -> None:
    shape = RWKV7[name]
    fla.write(random_checkpoint(shape), tmp_path / "hf")
    ids = random_ids(TOKENS, shape.vocab_size)
    with torch.inference_mode():
        expected = hf_model(tmp_path / "hf")(ids[None]).logits[0]
    assert error(our_logits(rwkvx.load(tmp_path / "hf"), ids), expected) <= TOLERANCE


@needs("rwkv7-hf")
@pytest.mark.parametrize("name", RWKV7)
def test_folders_that_rwkv7_hf_converts(name: str, tmp_path: Path) -> None:
    """Its converter makes the folder from BlinkDL's layout; tensors and function come back."""
    shape, checkpoint = RWKV7[name], random_checkpoint(RWKV7[name])
    pth.write(checkpoint, tmp_path / "m.pth")
    hf_convert(tmp_path / "m.pth", tmp_path / "hf")
    model = rwkvx.load(tmp_path / "hf")
    for tensor, x in checkpoint.tensors.items():
        assert torch.equal(model.state_dict()[tensor], x), tensor
    ids = random_ids(TOKENS, shape.vocab_size)
    with torch.inference_mode():
        expected = hf_model(tmp_path / "hf")(ids[None]).logits[0]
    assert error(our_logits(model, ids), expected) <= TOLERANCE


@needs("rwkv7-hf")
@pytest.mark.parametrize("heads", [16, 32, 128])
def test_rwkv7_hf_changes_the_function_unless_heads_are_of_64(heads: int, tmp_path: Path) -> None:
    """BlinkDL's group norm has eps 64e-5 at any head size, that of fla and rwkv7-hf grows with it.

    Small values let the eps weigh.
    """
    shape = config(width=128, pattern=["rwkv7"] * 2, head_size=heads)
    model = random_model(shape)
    with torch.no_grad():
        for block in model.blocks:
            block.att.value.weight *= 0.03
    pth.write(Checkpoint.of(model), tmp_path / "m.pth")
    hf_convert(tmp_path / "m.pth", tmp_path / "hf")
    ids = random_ids(12, shape.vocab_size)
    exact = exact_logits(model, ids)
    with torch.inference_mode():
        theirs = hf_model(tmp_path / "hf")(ids[None]).logits[0]
    assert error(our_logits(rwkvx.load(tmp_path / "m.pth"), ids), exact) <= TOLERANCE
    assert error(theirs, exact) > 100 * TOLERANCE


@pytest.mark.parametrize("name", RWKV7)
def test_the_equations_in_float64(name: str) -> None:
    """What the peers are held against holds for us: float32 rounding apart, the same logits."""
    model, ids = random_model(RWKV7[name]), random_ids(16, RWKV7[name].vocab_size)
    assert error(our_logits(model, ids), exact_logits(model, ids)) <= TOLERANCE


def test_golden_logits_of_rwkv_cpp() -> None:
    data = os.environ.get("RWKVX_DATA")
    folder = Path(data or ".") / "rwkv7_tiny_834k"
    if not data or not folder.is_dir():
        pytest.skip("RWKVX_DATA names no folder with rwkv7_tiny_834k")
    model = rwkvx.load(folder / "tiny-rwkv-7v0-834K-FP32.bin")
    golden = np.fromfile(folder / "expected-logits-7v0-834K.bin", np.float32)
    ids = torch.tensor(model.tokenizer.encode('"in'))
    assert error(our_logits(model, ids)[-1], torch.from_numpy(golden)) <= TOLERANCE
