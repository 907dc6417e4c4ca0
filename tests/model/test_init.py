"""Initial weights against BlinkDL's published values, written out again per tensor.

l index among the RWKV-7 blocks, L their number, c channel, C width, N head size.
"""

import math

import pytest
import torch
from torch import Tensor

from rwkvx import Model, ModelConfig, hybrid_pattern, init_weights

WIDTH, SIZE, VOCAB = 128, 32, 500
PROJECTIONS = {"receptance": 1.0, "key": 0.1, "value": 1.0}


def config(layers: int = 4, sparse: int = 2, **change: int) -> ModelConfig:
    return ModelConfig(
        VOCAB, WIDTH, hybrid_pattern(layers, sparse), SIZE, **change, tokenizer="bytes"
    )


def initial(layers: int = 4, sparse: int = 2, seed: int = 0, **change: int) -> dict[str, Tensor]:
    return init_weights(Model(config(layers, sparse, **change)), seed).state_dict()


def channel_values(layer: int, layers: int) -> dict[str, list[float]]:
    """The tensors that are functions of the channel."""
    rho = 1 - layer / layers
    sigma = layer / (layers - 1) if layers > 1 else 0.0
    table: dict[str, list[float]] = {}
    for c in range(WIDTH):
        line = c / (WIDTH - 1) - 0.5
        z = (c % SIZE - (SIZE - 1) / 2) / ((SIZE - 1) / 2)
        zigzag = z * abs(z)
        values = {
            "x_r": 1 - (c / WIDTH) ** (0.2 * rho),
            "x_g": 1 - (c / WIDTH) ** (0.2 * rho),
            "x_w": 1 - (c / WIDTH) ** (0.9 * rho),
            "x_a": 1 - (c / WIDTH) ** (0.9 * rho),
            "x_k": 1 - (c / WIDTH) ** (0.7 * rho),
            "x_v": 1 - (c / WIDTH) ** (0.7 * rho),
            "w0": -6 + 6 * (c / (WIDTH - 1)) ** (1 + sigma**0.3) + 0.5 + 2.5 * zigzag,
            "a0": -0.19 + 0.3 * zigzag + 0.4 * line,
            "v0": 0.73 - 0.4 * line,
            "k_k": 0.71 - 0.1 * line,
            "k_a": 1.02,
            "ln_x.weight": ((layer + 1) / layers) ** 0.7,
            "ln_x.bias": 0.0,
        }
        for name, value in values.items():
            table.setdefault(name, []).append(value)
    return table


def rwkv_blocks(layers: int, sparse: int) -> list[int]:
    return [i for i, k in enumerate(hybrid_pattern(layers, sparse)) if k == "rwkv7"]


@pytest.mark.parametrize(("layers", "sparse"), [(4, 2), (3, 0), (1, 1), (1, 0), (12, 4)])
def test_functions_of_the_channel(layers: int, sparse: int) -> None:
    tensors = initial(layers, sparse)
    for layer, block in enumerate(rwkv_blocks(layers, sparse)):
        for name, values in channel_values(layer, layers).items():
            if name == "v0" and layer == 0:
                assert f"blocks.{block}.att.v0" not in tensors
                continue
            got = tensors[f"blocks.{block}.att.{name}"]
            expected = torch.tensor(values, dtype=torch.float64)
            torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
        rho = 1 - layer / layers
        mix = [1 - (c / WIDTH) ** (rho**4) for c in range(WIDTH)]
        got = tensors[f"blocks.{block}.ffn.x_k"].double()
        torch.testing.assert_close(got, torch.tensor(mix).double(), rtol=1e-5, atol=1e-5)
        assert (tensors[f"blocks.{block}.att.r_k"] == torch.tensor(-0.04)).all()


def assert_orthogonal(weight: Tensor, gain: float) -> None:
    """All singular values equal the gain."""
    values = torch.linalg.svdvals(weight.double())
    torch.testing.assert_close(values, torch.full_like(values, gain), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("layers", [1, 4])
def test_matrices(layers: int) -> None:
    tensors = initial(layers, 1, decay_rank=160)
    for layer, block in enumerate(rwkv_blocks(layers, 1)):
        att, ffn = f"blocks.{block}.att", f"blocks.{block}.ffn"
        for name, gain in PROJECTIONS.items():
            assert_orthogonal(tensors[f"{att}.{name}.weight"], gain)
        assert_orthogonal(tensors[f"{ffn}.key.weight"], 1.0)
        assert not tensors[f"{att}.output.weight"].any()
        assert not tensors[f"{ffn}.value.weight"].any()
        for x in "wag" if layer == 0 else "wavg":
            assert not tensors[f"{att}.{x}1"].any()
            rows, columns = tensors[f"{att}.{x}2"].shape
            gain = 0.1 * math.sqrt(rows / columns) if rows > columns else 0.1
            assert_orthogonal(tensors[f"{att}.{x}2"], gain)
    assert_orthogonal(tensors["head.weight"], 0.5 * math.sqrt(VOCAB / WIDTH))
    emb = tensors["emb.weight"]
    assert float(emb.abs().max()) <= 1e-4
    assert float(emb.std()) == pytest.approx(2e-4 / math.sqrt(12), rel=0.02)


def test_a_small_vocabulary_has_a_head_of_gain_one_half() -> None:
    model = init_weights(Model(ModelConfig(100, WIDTH, ("rwkv7",), SIZE, tokenizer="bytes")))
    assert_orthogonal(model.head.weight.detach(), 0.5)


def test_norms() -> None:
    for name, x in initial().items():
        if ".ln" in f".{name}" and ".ln_x." not in name:
            assert (x == (1 if name.endswith("weight") else 0)).all(), name


def test_sparse_blocks_start_as_the_identity() -> None:
    """Keys of gain 1, no output, a convolution that passes the token itself."""
    tensors = initial(key_conv=4)
    for block in (2, 5):
        att = f"blocks.{block}.att"
        for name in ("receptance", "key", "value"):
            assert_orthogonal(tensors[f"{att}.{name}.weight"], 1.0)
        assert not tensors[f"{att}.output.weight"].any()
        assert (tensors[f"{att}.key_conv"] == torch.tensor([0, 0, 0, 1.0])[:, None]).all()
        assert not tensors[f"blocks.{block}.ffn.value.weight"].any()


def test_every_parameter_is_filled() -> None:
    model = Model(config(key_conv=3))
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    init_weights(model)
    for name, x in model.named_parameters():
        assert x.isfinite().all(), name


def test_seeds() -> None:
    first, same, other = initial(seed=1), initial(seed=1), initial(seed=2)
    assert all(torch.equal(first[n], same[n]) for n in first)
    drawn = {n for n in first if not torch.equal(first[n], other[n])}
    assert "emb.weight" in drawn
    assert "blocks.1.att.w2" in drawn
    assert "blocks.1.att.w0" not in drawn
    model, state = Model(config()), torch.get_rng_state()
    init_weights(model)
    assert torch.equal(state, torch.get_rng_state()), "the global generator is left alone"
    blocks = [first[f"blocks.{i}.att.receptance.weight"] for i in range(6)]
    assert len({float(x.sum()) for x in blocks}) == 6


def test_bfloat16_weights_are_the_rounded_ones() -> None:
    """Drawn in float32 and cast after: an orthogonal init in bfloat16 elsewhere did nothing."""
    exact = initial()
    for name, x in init_weights(Model(config()).bfloat16()).state_dict().items():
        assert x.dtype == torch.bfloat16
        assert torch.equal(x, exact[name].bfloat16()), name


def test_the_first_step_is_the_identity() -> None:
    """All outputs are zero: logits are those of the embedding alone."""
    model = init_weights(Model(config()))
    ids = torch.arange(20)[None]
    logits, _ = model(ids)
    expected = model.head(model.ln_out(model.ln0(model.emb(ids))))
    assert torch.equal(logits, expected)
