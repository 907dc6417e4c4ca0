"""What one token through a block needs: weights, what was read before, and where they lie.

Axes: C width, H heads, D head size, G key/value heads, F inner width of the channel mix, S tokens
that a cache has room for, W width of the key convolution.
"""

from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)


class BlockWeights(NamedTuple):
    """Weights of one block, contiguous on the CPU and of one dtype (float32 or bfloat16).

    Matrices may be int8, with float32 scales for their rows. An attention block (no `mixes`) gives
    norms, matrices, channel mix and key convolution. None stands for what a block lacks: scales,
    the value residual of the first.
    """

    heads: int  # H, query heads of an attention block
    eps: tuple[float, float, float]  # of ln1, ln2 and, with `mixes`, the group norm
    ln1: tuple[Tensor, Tensor]  # weight, bias [C]
    ln2: tuple[Tensor, Tensor]
    channel: tuple[Tensor, Tensor, Tensor]  # x_k [C], key [F, C], value [C, F]
    channel_scales: tuple[Tensor | None, ...]  # [F], [C]
    mixes: tuple[Tensor | None, ...] = (None,) * 6  # [C] of r, w, k, v, a, g
    matrices: tuple[Tensor | None, ...] = (None,) * 4  # receptance [C, C], key, value, output
    scales: tuple[Tensor | None, ...] = (None,) * 4  # [C] of these
    down: tuple[Tensor | None, ...] = (None,) * 4  # [C, rank] of w, a, v, g
    up: tuple[Tensor | None, ...] = (None,) * 4  # [rank, C]
    vectors: tuple[Tensor | None, ...] = (None,) * 8  # [C], as `time_mix.TimeMixWeights`
    conv: tuple[Tensor | None] = (None,)  # [W, G D]

    def tensors(self) -> list[Tensor | None]:
        """All, one after the other."""
        return [x for part in self[2:] for x in part]

    def fit(self, dtype: torch.dtype) -> bool:
        """Whether they are as said above, of that dtype."""
        matrices = (*self.channel[1:], *self.matrices)
        scales = (*self.channel_scales, *self.scales)
        kind = torch.int8 if self.channel_scales[0] is not None else dtype
        expected = {id(x): kind for x in matrices} | {id(x): torch.float32 for x in scales}
        return dtype in DTYPES and all(
            x.dtype == expected.get(id(x), dtype) and x.is_contiguous() and x.device.type == "cpu"
            for x in self.tensors()
            if x is not None
        )


class Cache(NamedTuple):
    """What an attention block has read, contiguous and of the weights' dtype.

    The token is written to `position`; it attends by flat selection to `topk` chunks. The mean of
    a chunk that it completes is left to the caller.
    """

    k: Tensor  # [1, G, S, D]
    v: Tensor
    means: Tensor  # [1, G, chunks, D] float32
    position: int
    topk: int
    conv: Tensor | None = None  # [1, W - 1, G D], keys before the convolution
    new_conv: Tensor | None = None  # the same, written
