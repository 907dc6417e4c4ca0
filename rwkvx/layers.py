"""What all kinds of block share: projections, the channel mix, the token shift and its norm.

Axes: B batch, T time, C width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from rwkvx.sequence import SequenceParallel
from rwkvx_kernels.channel_mix import squared_relu
from rwkvx_kernels.linear import linear
from rwkvx_kernels.token_shift import Norm, fuses_norm, token_shift

# What a model's `impl` means for products: torch's are faster than Triton's would be.
PRODUCTS = {"triton": "torch"}


class Linear(nn.Linear):
    """A product with a weight matrix, without bias; an int8 weight has a scale for each row."""

    scale: nn.Parameter | None

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.register_parameter("scale", None)
        self.impl = "auto"

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs]."""
        return linear(x, self.weight, self.scale, PRODUCTS.get(self.impl, self.impl))


class ChannelMix(nn.Module):
    """W_v relu(W_k (x + (shift(x) - x) x_k))^2 (arXiv 2503.14456, eq. 21-22)."""

    shifts = True  # see `Mixer`

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.x_k = nn.Parameter(torch.empty(width))
        self.key = Linear(width, inner)
        self.value = Linear(inner, width)
        self.impl = "auto"
        self.sequence: SequenceParallel | None = None  # who reads the other parts of a sequence

    def forward(
        self,
        x: Tensor,
        shift: Tensor,
        cu_seqlens: Tensor | None = None,
        norm: Norm | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x [B, T, C], normalised but for `norm`, and the last input before it, normalised, [B, C]
        -> output, new shift."""
        (mixed,), shift = shifted(self, x, shift, [self.x_k], cu_seqlens, norm)
        hidden = squared_relu(self.key(mixed), self.impl, overwrite=True)
        return self.value(hidden), shift


def shifted(
    mixer: Any,
    x: Tensor,
    previous: Tensor,
    mixes: list[Tensor],
    cu_seqlens: Tensor | None,
    norm: Norm | None,
) -> tuple[list[Tensor], Tensor]:
    """The token shift that a mixer begins with, and the new state: of the normed tokens, the last
    one of each sequence [B or sequences, C].

    mixer: has `impl` and `sequence`. The others are as for `token_shift`.
    """
    start = previous
    if mixer.sequence is not None:
        start = mixer.sequence.before(_last_token(x, previous, None, norm), previous)
    mixed = token_shift(x, start, mixes, cu_seqlens, mixer.impl, norm)
    return mixed, _last_token(x, previous, cu_seqlens, norm)


def _last_token(
    x_BTC: Tensor, previous: Tensor, cu_seqlens: Tensor | None, norm: Norm | None
) -> Tensor:
    """The last token of each sequence, normed; of an empty one what was before it."""
    if cu_seqlens is None:
        last = x_BTC[:, -1]
        if norm is not None:
            return norm(last)
        # A copy, or the state would hold the whole segment.
        return last if x_BTC.shape[1] == 1 else last.clone()
    some, last = cu_seqlens.diff() > 0, x_BTC[0, cu_seqlens[1:] - 1]
    return torch.where(some.unsqueeze(1), last if norm is None else norm(last), previous)


def normed(layer: nn.LayerNorm, x: Tensor, reader: Any) -> tuple[Any, ...]:
    """What a mixer reads of x [B, T, C] after a layer norm: that; or x as it is, and the norm that
    its token shift does by the way.

    reader: has `shifts` and `impl`. Where somebody put another module or watches what goes in or
    out, the norm is called.
    """
    fused = (
        reader.shifts
        and type(layer) is nn.LayerNorm
        and layer.bias is not None
        and fuses_norm(x, reader.impl)
        and not (is_hooked(layer) or is_hooked(reader))
    )
    return (x, norm_of(layer)) if fused else (layer(x),)


def norm_of(layer: nn.LayerNorm) -> Norm:
    """What kernels read of a layer norm."""
    return Norm(layer.weight, layer.bias, layer.eps)


def is_hooked(module: nn.Module) -> bool:
    """Whether calling a module does more, or something else, than its class says."""
    hooks = (
        *(module._forward_hooks, module._forward_pre_hooks),
        *(module._backward_hooks, module._backward_pre_hooks),
    )
    return any(hooks) or "forward" in vars(module)
