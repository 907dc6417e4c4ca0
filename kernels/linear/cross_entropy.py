"""The cross-entropy of logits that a product gives, for any number of tokens in bounded memory.

Axes: T tokens, C width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkvx_kernels.dispatch import autocast_dtype, without_autocast

# Up to so many logits are made at once (in float32, 256 MB; their gradient takes their place).
MOST_LOGITS = 2**26


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, most_logits: int = MOST_LOGITS
) -> Tensor:
    """Sum over tokens of `weights * cross_entropy(x @ weight.T, targets)`, differentiable once.

    Up to `most_logits` logits all are made; beyond, a tile of tokens at a time, whose gradients
    are made at once, as the weights of the tokens are known: no product is done twice.

    Args:
        x: [T, C]. weight: [V, C]. Under `torch.autocast` the product is in its dtype.
        targets: [T] int64. weights: [T], of which no gradient is wanted.

    Returns:
        the loss, a float32 scalar (float64 for float64).
    """
    if x.dim() != 2 or x.shape[0] != len(targets) or x.shape[0] != len(weights):
        shapes = [list(t.shape) for t in (x, targets, weights)]
        raise ValueError(f"x must be [T, C], targets and weights [T], got {shapes}")
    if x.shape[0] * weight.shape[0] <= most_logits:
        return _loss(F.linear(x, weight), targets, weights)
    dtype = autocast_dtype(x)
    tile = max(1, most_logits // weight.shape[0])
    return _tiled(x.to(dtype), weight.to(dtype), targets, weights, tile)


def _loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    wide = torch.promote_types(logits.dtype, torch.float32)
    return (F.cross_entropy(logits.to(wide), targets, reduction="none") * weights).sum()


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, tile: int
    ) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        wants = ctx.needs_input_grad
        loss = x.new_zeros((), dtype=wide)
        dx = torch.empty_like(x) if wants[0] else None
        dweight = torch.zeros_like(weight, dtype=wide) if wants[1] else None
        for start in range(0, len(x), tile):
            part = slice(start, start + tile)
            logits = F.linear(x[part], weight).to(wide)
            logits -= torch.logsumexp(logits, dim=1, keepdim=True)
            own = targets[part].unsqueeze(1)
            loss -= (logits.gather(1, own).squeeze(1) * weights[part]).sum()
            # weights (softmax - one at the target), in place of the logits
            dlogits = logits.exp_()
            dlogits.scatter_add_(1, own, dlogits.new_full((1, 1), -1.0).expand_as(own))
            dlogits = dlogits.mul_(weights[part].unsqueeze(1)).to(x.dtype)
            if dx is not None:
                dx[part] = dlogits @ weight
            if dweight is not None:
                dweight += dlogits.T @ x[part]
        ctx.save_for_backward(dx, None if dweight is None else dweight.to(weight.dtype))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = (t if t is None else t * dloss.to(t.dtype) for t in ctx.saved_tensors)
        return dx, dweight, None, None, None


@without_autocast
def _tiled(x: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, tile: int) -> Tensor:
    loss: Tensor = _Tiles.apply(x, weight, targets, weights, tile)
    return loss
