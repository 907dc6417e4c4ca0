"""A training step of a whole hybrid: forward, backward, gradient norm, optimiser."""

from __future__ import annotations

import copy
from functools import cache, partial

import torch
from torch import Tensor

import rwkvx
from rwkvx.costs import mixing_flops
from rwkvx_evals.bench.kernels.case import OURS, Call, Case, Plan, planned
from rwkvx_evals.bench.kernels.error import relative_error
from rwkvx_evals.bench.kernels.models import hybrid_shape
from rwkvx_evals.bench.step import Step, fresh_model, random_batch

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


def _step(device: str, tokens: int) -> Step:
    model = fresh_model(hybrid_shape(), device)
    return Step(model, random_batch(model.config.vocab_size, 1, tokens, device), half=True)


def _subjects(device: str, tokens: int) -> dict[str, Call]:
    return {OURS: _step(device, tokens)}


@cache
def _error(device: str) -> float:
    """Of all gradients as one vector."""
    step = _step(device, CHECKED_TOKENS)
    wide = step.batch._replace(weights=step.batch.weights.double())
    exact = Step(copy.deepcopy(step.model).double(), wide, half=False)
    for one in (step, exact):
        one.backward()
    return relative_error([_gradients(step.model)], [_gradients(exact.model)])


def _gradients(model: rwkvx.Model) -> Tensor:
    return torch.cat([x.grad.flatten() for x in model.parameters() if x.grad is not None])
