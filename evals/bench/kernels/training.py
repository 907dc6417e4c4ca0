"""A training step of a whole hybrid: forward, backward, gradient norm, optimiser."""

from __future__ import annotations

import copy
from functools import cache, partial

import torch
from torch import Tensor, nn

import rwkvx
from rwkvx.costs import mixing_flops
from rwkvx.init import init_weights
from rwkvx.training.batches import Batch
from rwkvx.training.config import OptimizerConfig
from rwkvx.training.forward import Objective
from rwkvx.training.optim import build_optimizer
from rwkvx_evals.bench.kernels.case import OURS, Call, Case, Plan, planned
from rwkvx_evals.bench.kernels.error import relative_error
from rwkvx_evals.bench.kernels.models import hybrid_shape

STEP = "training step, 0.22B shape"
PLANS: dict[str, Plan] = {STEP: {16384: 1, 65536: 4}}
CHECKED_TOKENS = 512
# All gradients together, of sixteen blocks in bfloat16.
TOLERANCE = 0.1
# Of each number of the weights, in float32: it, its gradient and two moments, read and written.
WEIGHT_BYTES = 4 * 8


def cases(device: str, lengths: tuple[int, ...]) -> list[Case]:
    """One sequence of random tokens, weights in float32, products in bfloat16."""
    config = hybrid_shape()
    with torch.device("meta"):
        model = rwkvx.Model(config)
    numbers = sum(x.numel() for x in model.parameters())
    matrices = sum(x.numel() for x in model.blocks.parameters() if x.dim() == 2)
    matrices += model.head.weight.numel()
    found = []
    for tokens, importance in planned(PLANS[STEP], lengths).items():
        forward = 2 * matrices * tokens + mixing_flops(config, 0, tokens)["attention"]
        found.append(
            Case(
                family=STEP,
                tokens=tokens,
                bytes=numbers * WEIGHT_BYTES,
                flops=3 * forward,
                subjects=partial(_subjects, device, tokens),
                errors={OURS: partial(_error, device)},
                tolerance=TOLERANCE,
                importance=importance,
                cost=15 + tokens / 2**13,
            )
        )
    return found


def _batch(device: str, tokens: int) -> Batch:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(hybrid_shape().vocab_size, (1, tokens + 1), generator=draw)
    weights = torch.full((1, tokens), 1 / tokens, device=device)
    starts = torch.zeros(1, tokens, dtype=torch.bool)
    inputs, targets = ids[:, :-1].to(device), ids[:, 1:].to(device)
    return Batch(inputs, targets, weights, starts.to(device), starts.numpy())


def _model(device: str) -> rwkvx.Model:
    return init_weights(rwkvx.Model(hybrid_shape()), 0).to(device).train()


def _backward(objective: Objective, batch: Batch, device: str) -> None:
    with torch.autocast(device, dtype=torch.bfloat16):
        loss, _ = objective(batch)
    loss.backward()


def _subjects(device: str, tokens: int) -> dict[str, Call]:
    return {OURS: step_of(_model(device), _batch(device, tokens), device)}


def step_of(model: rwkvx.Model, batch: Batch, device: str) -> Call:
    """What makes one step."""
    objective, optimizer = Objective(model), build_optimizer(model, OptimizerConfig())

    def step() -> None:
        _backward(objective, batch, device)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


@cache
def _error(device: str) -> float:
    """Of all gradients as one vector."""
    model, batch = _model(device), _batch(device, CHECKED_TOKENS)
    exact = copy.deepcopy(model).double()
    _backward(Objective(model), batch, device)
    weights = batch.weights.double()
    loss, _ = Objective(exact)(batch._replace(weights=weights))
    loss.backward()
    return relative_error([_gradients(model)], [_gradients(exact)])


def _gradients(model: rwkvx.Model) -> Tensor:
    return torch.cat([x.grad.flatten() for x in model.parameters() if x.grad is not None])
