"""The cross-entropy of logits that a product gives, for any number of tokens in bounded memory.

Axes: T tokens, C width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkvx_kernels.dispatch import (
    Choice,
    Facts,
    autocast_dtype,
    decide,
    facts_of,
    remembered,
    triton_lacks,
    without_autocast,
)

# Up to so many logits are made at once (in float32, 256 MB; their gradient takes their place).
MOST_LOGITS = 2**26
# A CPU takes the softmax of so many at a time, in its cache.
CACHED_LOGITS = 2**18


@remembered
def choose(facts: Facts, impl: str = "auto") -> Choice:
    """Which implementation a tile of `linear_cross_entropy` runs."""
    triton = triton_lacks(facts)
    if not triton:
        from rwkvx_kernels.linear.options import STAGES, TABLE
        from rwkvx_kernels.tools.triton_options import missing  # Triton may be missing

        triton = missing(TABLE, STAGES, facts.dtype, 1, facts.device)
    return decide(impl, facts, {"triton": triton, "torch": ""})


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    most_logits: int = MOST_LOGITS,
    impl: str = "auto",
) -> Tensor:
    """Sum over tokens of `weights * cross_entropy(x @ weight.T, targets)`, differentiable once.

    As the weights of the tokens are known, gradients are made with the loss, in the place of the
    logits: no product is done twice, and a tile of `most_logits` is all that is there at once.

    Args:
        x: [T, C]. weight: [V, C]. Under `torch.autocast` the product is in its dtype.
        targets: [T] int64. weights: [T], of which no gradient is wanted.
        impl: of a tile: "auto", "torch" or "triton" (one pass over the logits).

    Returns:
        the loss, a float32 scalar (float64 for float64).

    Raises:
        UnsupportedError: Triton kernels for float64 or without a GPU.
    """
    if x.dim() != 2 or x.shape[0] != len(targets) or x.shape[0] != len(weights):
        shapes = [list(t.shape) for t in (x, targets, weights)]
        raise ValueError(f"x must be [T, C], targets and weights [T], got {shapes}")
    dtype = autocast_dtype(x)
    tile = max(1, most_logits // weight.shape[0])
    x, weight = x.to(dtype), weight.to(dtype)
    return _tiled(x, weight, targets, weights, tile, choose(facts_of(x), impl).impl)


def _losses_and_gradients(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """As `triton_entropy.losses_and_gradients`, in float32 between."""
    rows = len(logits)
    if logits.device.type == "cpu":
        rows = max(1, CACHED_LOGITS // logits.shape[1])
    parts = zip(*(t.split(rows) for t in (logits, targets, weights)), strict=True)
    return torch.cat([_in_place(*part) for part in parts])


def _in_place(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_shares = wide.sub_(torch.logsumexp(wide, dim=1, keepdim=True))
    own = targets.unsqueeze(1)
    losses = -log_shares.gather(1, own).squeeze(1) * weights
    # weights (softmax - one at the target)
    gradients = log_shares.exp_()
    gradients.scatter_add_(1, own, gradients.new_full((1, 1), -1.0).expand_as(own))
    logits.copy_(gradients.mul_(weights.unsqueeze(1)))
    return losses


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, tile: int, impl: str
    ) -> Tensor:
        if impl == "triton":
            from rwkvx_kernels.linear.triton_entropy import losses_and_gradients  # may be missing
        else:
            losses_and_gradients = _losses_and_gradients
        wide = torch.promote_types(x.dtype, torch.float32)
        wants = ctx.needs_input_grad
        loss = x.new_zeros((), dtype=wide)
        dx = torch.empty_like(x) if wants[0] else None
        dweight = torch.zeros_like(weight, dtype=wide) if wants[1] else None
        for start in range(0, len(x), tile):
            part = slice(start, start + tile)
            logits = F.linear(x[part], weight)
            loss += losses_and_gradients(logits, targets[part], weights[part]).sum()
            if dx is not None:
                dx[part] = logits @ weight  # gradients by now
            if dweight is not None:
                dweight += logits.T @ x[part]
        ctx.save_for_backward(dx, None if dweight is None else dweight.to(weight.dtype))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = (t if t is None else t * dloss.to(t.dtype) for t in ctx.saved_tensors)
        return dx, dweight, None, None, None, None


@without_autocast
def _tiled(
    x: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, tile: int, impl: str
) -> Tensor:
    loss: Tensor = _Tiles.apply(x, weight, targets, weights, tile, impl)
    return loss
