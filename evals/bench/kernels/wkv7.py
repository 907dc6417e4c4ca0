"""WKV7 forward, and with backward, beside `chunk_rwkv7` of fla-core where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkvx_evals.bench.kernels.case import Call, Case
from rwkvx_kernels.wkv7 import wkv7

HEADS, SIZE = 16, 64
CHECKED_TOKENS = 512  # the recurrence in float64 takes its time
# Rounding of inputs' own dtype, bfloat16, once in the result and once on the way.
TOLERANCE = 1e-2


def cases(device: str, lengths: tuple[int, ...]) -> list[Case]:
    """Batch 1, 16 heads of 64 channels, bfloat16 with float32 log decays."""
    # r, k, v, alpha, beta and y of 2 bytes, log_decay of 4; backward: dy and all gradients too.
    forward = HEADS * SIZE * (6 * 2 + 4)
    found = []
    for tokens in lengths:
        for backward in (False, True):
            found.append(
                Case(
                    family="wkv7 forward + backward" if backward else "wkv7 forward",
                    tokens=tokens,
                    bytes=tokens * forward * (3 if backward else 1),
                    flops=tokens * HEADS * SIZE * SIZE * (27 if backward else 9),
                    subjects=partial(_subjects, device, tokens, backward),
                    errors=partial(_errors, device, backward),
                    tolerance=TOLERANCE,
                )
            )
    return found


def _inputs(device: str, tokens: int, backward: bool) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, tokens, HEADS, SIZE)
    r, decay, k, v, kk, gate = (
        torch.randn(shape, generator=generator, device=device) for _ in range(6)
    )
    kk = F.normalize(kk, dim=-1)
    values = [r, -0.6065 * decay.sigmoid(), k, v, -kk, kk * gate.sigmoid()]
    narrow = [x if i == 1 else x.bfloat16() for i, x in enumerate(values)]
    return [x.requires_grad_(backward) for x in narrow]


def _implementations() -> dict[str, Callable[..., Tensor]]:
    found: dict[str, Callable[..., Tensor]] = {"ours": _ours}
    if find_spec("fla") is not None:
        found["fla chunk_rwkv7"] = _fla()
    return found


def _ours(
    r: Tensor, log_decay: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor
) -> Tensor:
    return wkv7(r, log_decay, k, v, alpha, beta)[0]


def _exact(
    r: Tensor, log_decay: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor
) -> Tensor:
    return wkv7(r, log_decay, k, v, alpha, beta, impl="reference")[0]


@cache
def _fla() -> Callable[..., Tensor]:
    from fla.ops.rwkv7 import chunk_rwkv7

    def call(*args: Tensor) -> Tensor:
        named: dict[str, Any] = dict(zip(("r", "w", "k", "v", "a", "b"), args, strict=True))
        y: Tensor = chunk_rwkv7(**named, scale=1.0, output_final_state=True)[0]
        return y

    return call


def _subjects(device: str, tokens: int, backward: bool) -> dict[str, Call]:
    inputs = _inputs(device, tokens, backward)
    dy = torch.randn_like(inputs[3])

    def call(implementation: Callable[..., Tensor]) -> object:
        if not backward:
            return implementation(*inputs)
        return torch.autograd.grad(implementation(*inputs), inputs, dy)

    return {name: partial(call, x) for name, x in _implementations().items()}


def _errors(device: str, backward: bool) -> dict[str, float]:
    """The largest error of the output, or of all gradients, each relative to its own size."""
    inputs = _inputs(device, CHECKED_TOKENS, True)

    def results(implementation: Callable[..., Tensor], args: list[Tensor]) -> tuple[Tensor, ...]:
        y = implementation(*args)
        generator = torch.Generator(device).manual_seed(1)
        dy = torch.randn(y.shape, generator=generator, device=device).to(y.dtype)
        return torch.autograd.grad(y, args, dy) if backward else (y.detach(),)

    wide = [x.detach().double().requires_grad_() for x in inputs]
    exact = results(_exact, wide)
    return {
        name: max(
            float((a.double() - b).norm() / b.norm())
            for a, b in zip(results(x, inputs), exact, strict=True)
        )
        for name, x in _implementations().items()
    }
