"""WKV7 forward, and with backward, beside `chunk_rwkv7` of fla-core where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkvx_evals.bench.kernels.case import OURS, Call, Case, Plan, planned
from rwkvx_evals.bench.kernels.error import backward_of, relative_error
from rwkvx_evals.bench.machine import installed
from rwkvx_kernels.wkv7 import wkv7

FORWARD, BOTH = "wkv7 forward", "wkv7 forward + backward"
ROWS = "wkv7 forward + backward, 8 sequences"
FLA, FLA_BOUNDED = "fla chunk_rwkv7", "fla chunk_rwkv7, lower_bound"
LEAST_LOG_DECAY = -0.6066
HEADS, SIZE = 16, 64
PLANS: dict[str, Plan] = {
    FORWARD: {65536: 1, 2**20: 1, 16384: 3},
    BOTH: {16384: 1, 65536: 2},
    ROWS: {4096: 1},
}
BATCH = {ROWS: 8}  # sequences; of the others one
PEERS_UNTIL = 65536  # tokens
CHECKED_TOKENS = 512  # the recurrence in float64 takes its time
# Rounding of inputs' own dtype, bfloat16, once in the result and once on the way.
TOLERANCE = 1e-2

Implementation = Callable[..., Tensor]


def cases(device: str, lengths: tuple[int, ...]) -> list[Case]:
    """16 heads of 64 channels, bfloat16 with float32 log decays."""
    # r, k, v, alpha, beta and y of 2 bytes, log_decay of 4; backward: dy and all gradients too.
    forward = HEADS * SIZE * (6 * 2 + 4)
    found = []
    for family, plan in PLANS.items():
        backward, batch = family != FORWARD, BATCH.get(family, 1)
        for tokens, importance in planned(plan, lengths).items():
            names, read = list(_implementations(tokens)), batch * tokens
            found.append(
                Case(
                    family=family,
                    tokens=tokens,
                    bytes=read * forward * (3 if backward else 1),
                    flops=read * HEADS * SIZE * SIZE * (27 if backward else 9),
                    subjects=partial(_subjects, device, (batch, tokens), backward),
                    errors={name: partial(_error, device, backward, name) for name in names},
                    tolerance=TOLERANCE,
                    importance=importance,
                    # fla tries many shapes of each kernel when it meets it first.
                    cost=8
                    + read / 2**18
                    + (60 if FLA in names and family == BOTH and importance == 1 else 0),
                    units=read,
                )
            )
    return found


def _inputs(device: str, sizes: tuple[int, int], backward: bool) -> list[Tensor]:
    """Of sequences and tokens of each."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (*sizes, HEADS, SIZE)

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def narrow(x: Tensor) -> Tensor:
        return x.bfloat16()

    # One after the other: at a million tokens a float32 tensor has 4 GiB.
    kk = F.normalize(normal(), dim=-1)
    alpha, beta = narrow(-kk), narrow(kk * normal().sigmoid_())
    del kk
    log_decay = normal().sigmoid_().mul_(-0.6065)
    found = [narrow(normal()), log_decay, narrow(normal()), narrow(normal()), alpha, beta]
    return [x.requires_grad_(backward) for x in found]


def _implementations(tokens: int) -> dict[str, Implementation]:
    found: dict[str, Implementation] = {OURS: _ours}
    if installed("fla-core") and tokens <= PEERS_UNTIL:
        found |= {FLA: _fla, FLA_BOUNDED: partial(_fla, lower_bound=LEAST_LOG_DECAY)}
    return found


def _ours(
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    beta: Tensor,
    impl: str = "auto",
) -> Tensor:
    return wkv7(r, log_decay, k, v, alpha, beta, impl=impl)[0]


def _fla(*args: Tensor, **options: float) -> Tensor:
    """With `lower_bound`, which newer versions have, it may use more of the matrix units."""
    from fla.ops.rwkv7 import chunk_rwkv7

    named: dict[str, Any] = dict(zip(("r", "w", "k", "v", "a", "b"), args, strict=True))
    y: Tensor = chunk_rwkv7(**named, scale=1.0, output_final_state=True, **options)[0]
    return y


def _subjects(device: str, sizes: tuple[int, int], backward: bool) -> dict[str, Call]:
    inputs = _inputs(device, sizes, backward)
    dy = torch.randn_like(inputs[3])

    def call(implementation: Implementation) -> object:
        y = implementation(*inputs)
        return torch.autograd.grad(y, inputs, dy) if backward else y

    return {name: partial(call, x) for name, x in _implementations(sizes[1]).items()}


@cache
def _error(device: str, backward: bool, name: str) -> float:
    """The largest error of the output, or of all gradients, each relative to its own size."""
    implementation = _implementations(CHECKED_TOKENS)[name]
    inputs = _inputs(device, (1, CHECKED_TOKENS), backward)
    return relative_error(_results(implementation, inputs, backward), _exact(device, backward))


@cache
def _exact(device: str, backward: bool) -> tuple[Tensor, ...]:
    wide = [x.detach().double() for x in _inputs(device, (1, CHECKED_TOKENS), False)]
    exactly = partial(_ours, impl="reference")
    return _results(exactly, [x.requires_grad_(backward) for x in wide], backward)


def _results(
    implementation: Implementation, inputs: list[Tensor], backward: bool
) -> tuple[Tensor, ...]:
    y = implementation(*inputs)
    return backward_of(y, inputs) if backward else (y,)
