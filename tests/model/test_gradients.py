"""Gradients of every parameter, against finite differences and the reference kernels."""

import pytest
import torch
import torch.nn.functional as F
from small import HYBRID, VARIANTS, error, random_ids, random_model, variant
from torch import Tensor

from rwkvx import Model


def loss_of(model: Model, ids: Tensor) -> Tensor:
    logits, _ = model(ids[:, :-1], keep_cache=False)
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def gradients(model: Model, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model, ids).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", VARIANTS)
def test_against_the_reference_kernels(name: str) -> None:
    model, ids = random_model(variant(name)), random_ids(150)
    got = gradients(model, ids)
    assert set(got) == {n for n, _ in model.named_parameters()}

    model.impl = "reference"
    for parameter, expected in gradients(model, ids).items():
        assert error(got[parameter], expected) < 1e-9, parameter


@pytest.mark.parametrize("name", ["conv_gqa", "sparse_first"])
def test_against_finite_differences(name: str) -> None:
    """Along a random direction for each parameter; all chunks are read: no choice can flip."""
    config = variant(name)
    model, ids = random_model(config), random_ids(config.topk * config.chunk_size, batch=1)
    grads = gradients(model, ids)
    torch.manual_seed(3)
    step = 1e-5
    for parameter_name, parameter in model.named_parameters():
        direction = torch.randn_like(parameter)
        start, values = parameter.detach().clone(), []
        with torch.no_grad():
            for sign in (1, -1):
                parameter.copy_(start + sign * step * direction)
                values.append(float(loss_of(model, ids)))
            parameter.copy_(start)
        slope = (values[0] - values[1]) / (2 * step)
        expected = float((grads[parameter_name] * direction).sum())
        assert slope == pytest.approx(expected, rel=1e-4, abs=1e-8), parameter_name


@pytest.mark.parametrize("packed", [False, True])
def test_gradient_checkpointing_changes_nothing(packed: bool) -> None:
    model, ids = random_model(HYBRID), random_ids(100, batch=1)
    arguments = {"cu_seqlens": torch.tensor([0, 33, 100])} if packed else {}

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        model(ids, **arguments, keep_cache=False)[0].square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = run()
    model.gradient_checkpointing = True
    for name, x in run().items():
        assert error(x, plain[name]) < 1e-12, name


def test_gradients_flow_with_and_without_keeping_the_cache() -> None:
    model, ids = random_model(HYBRID), random_ids(60)
    sums = []
    for keep in (True, False):
        model.zero_grad()
        model(ids, keep_cache=keep)[0].square().sum().backward()
        sums.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*sums, strict=True))


def test_float32_and_bfloat16_autocast_gradients() -> None:
    wide, ids = random_model(HYBRID), random_ids(40)
    exact = gradients(wide, ids)
    narrow = random_model(HYBRID).float()
    for name, x in gradients(narrow, ids).items():
        assert error(x, exact[name]) < 1e-4, name
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = gradients(narrow, ids)
    for name, x in mixed.items():
        assert x.isfinite().all()
        assert F.cosine_similarity(x.double().flatten(), exact[name].flatten(), 0) > 0.95, name
