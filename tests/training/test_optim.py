"""Parameter groups and learning-rate schedules."""

import itertools

import pytest
import torch

from rwkvx import Model, ModelConfig
from rwkvx.training.config import OptimizerConfig
from rwkvx.training.optim import (
    build_optimizer,
    learning_rate,
    parameter_groups,
    set_learning_rate,
)


def model() -> Model:
    return Model(
        ModelConfig(256, 16, ("rwkv7", "rwkv7", "sparse"), 8, key_conv=4, tokenizer="bytes")
    )


def test_groups() -> None:
    net = model()
    names = {id(p): n for n, p in net.named_parameters()}
    groups = parameter_groups(net, OptimizerConfig(weight_decay=0.3))
    found = {
        (g["weight_decay"], g["lr_scale"]): {names[id(p)] for p in g["params"]}  # type: ignore
        for g in groups
    }
    double, decayed = found[0.0, 2.0], found[0.3, 1.0]
    assert double == {"blocks.0.att.w0", "blocks.1.att.w0"}
    projections = ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")
    assert decayed == {"emb.weight", "head.weight"} | {
        f"blocks.{i}.{x}.weight" for i in range(3) for x in projections
    }
    plain = found[0.0, 1.0]
    assert {"blocks.0.att.w1", "blocks.0.att.r_k", "blocks.2.att.key_conv", "ln0.weight"} <= plain
    assert double | decayed | plain == set(names.values())
    assert len(double) + len(decayed) + len(plain) == len(names)


def test_frozen_parameters_are_left_out() -> None:
    net = model()
    net.emb.weight.requires_grad_(False)
    parameters = [
        p for g in build_optimizer(net, OptimizerConfig()).param_groups for p in g["params"]
    ]
    assert not any(p is net.emb.weight for p in parameters)


def test_optimiser_settings() -> None:
    optimizer = build_optimizer(model(), OptimizerConfig())
    assert {g["betas"] for g in optimizer.param_groups} == {(0.9, 0.99)}
    assert {g["eps"] for g in optimizer.param_groups} == {1e-18}
    set_learning_rate(optimizer, 0.5)
    assert sorted(g["lr"] for g in optimizer.param_groups) == [0.5, 0.5, 1.0]


def test_cosine() -> None:
    config = OptimizerConfig(lr=2.0, warmup=10, schedule="cosine", final=0.1)
    rates = [learning_rate(s, 110, config) for s in range(111)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[60] == pytest.approx(2.0 * 0.55)
    assert rates[110] == pytest.approx(0.2)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_warmup_stable_decay() -> None:
    config = OptimizerConfig(lr=1.0, warmup=0, schedule="wsd", decay=0.2, final=0.05)
    rates = [learning_rate(s, 100, config) for s in range(101)]
    assert rates[:81] == pytest.approx([1.0] * 81)
    assert rates[90] == pytest.approx(0.525)
    assert rates[100] == pytest.approx(0.05)


def test_weight_decay_moves_matrices_only() -> None:
    net = model()
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(1.0)
    optimizer = build_optimizer(net, OptimizerConfig(lr=0.1, weight_decay=0.5))
    set_learning_rate(optimizer, 0.1)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moved = {n for n, p in net.named_parameters() if not torch.equal(p, torch.ones_like(p))}
    assert "blocks.0.att.key.weight" in moved
    assert all(n.endswith(".weight") and ".ln" not in f".{n}" for n in moved)
