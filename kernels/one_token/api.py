"""One token through a run of blocks in one call: what goes in, and where it lies in memory.

Axes: C width, H heads, N head size, G key/value heads, F inner width of the channel mix, L blocks,
S tokens that a cache has room for, W width of the key convolution.
"""

from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)


def fits(x: Tensor, width: int) -> bool:
    """Whether `x` [..., C] is one token on the CPU, without gradients, of a compiled dtype."""
    if torch.is_grad_enabled() or x.numel() != width or x.dtype not in DTYPES:
        return False
    return x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


class BlockWeights(NamedTuple):
    """Weights of one block, contiguous on the CPU and of one dtype (float32 or bfloat16).

    Matrices may be int8, with float32 scales for their rows. An attention block (no `mixes`) gives
    norms, matrices, channel mix and key convolution. None stands for what a block lacks: scales,
    the value residual of the first.
    """

    ln1: tuple[Tensor, Tensor]  # weight, bias [C]
    ln2: tuple[Tensor, Tensor]
    channel: tuple[Tensor, Tensor, Tensor]  # x_k [C], key [F, C], value [C, F]
    channel_scales: tuple[Tensor | None, ...]  # [F], [C]
    mixes: tuple[Tensor | None, ...] = (None,) * 6  # [C] of r, w, k, v, a, g
    matrices: tuple[Tensor | None, ...] = (None,) * 4  # receptance [C, C], key, value, output
    scales: tuple[Tensor | None, ...] = (None,) * 4  # [C] of these
    down: tuple[Tensor | None, ...] = (None,) * 4  # [C, rank] of w, a, v, g
    up: tuple[Tensor | None, ...] = (None,) * 4  # [rank, C]
    vectors: tuple[Tensor | None, ...] = (None,) * 8  # [C] w0, a0, v0, k_k, k_a, r_k, group norm
    conv: tuple[Tensor | None] = (None,)  # [W, G N]
    eps: tuple[float, float, float] = (1e-5, 1e-5, 64e-5)  # of ln1, ln2 and the group norm
    heads: int = 0

    def tensors(self) -> list[Tensor | None]:
        """All, one after the other."""
        return [x for part in self[:-2] for x in part]

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

    k: Tensor  # [1, G, S, N]
    v: Tensor
    means: Tensor  # [1, G, chunks, N] float32
    position: int
    topk: int
    conv: Tensor | None = None  # [1, W - 1, G N], keys before the convolution
    new_conv: Tensor | None = None  # the same, written


class OneToken:
    """The blocks of a model, to be read by one token at a time.

    x + time_mix(ln1(x)), then x + channel_mix(ln2(x)) (arXiv 2503.14456, eq. 4-22), in float32.
    Weights are used where they are: when one has moved, make this anew.
    """

    def __init__(self, blocks: list[BlockWeights | None]) -> None:
        from rwkvx_kernels.one_token.cpu_compiled import Table

        self._table = Table(blocks)

    def read(
        self,
        blocks: range,
        x: Tensor,
        v_first: Tensor,
        shifts: list[tuple[Tensor, Tensor]],
        states: list[Tensor | None],
        caches: list[Cache | None],
        new_shifts: Tensor,
        new_states: Tensor,
    ) -> Tensor:
        """Through the blocks of that range, in place.

        An attention block without a cache can only be the first: what it attended to is given,
        and its output projection and channel mix follow. If blocks follow the last one, the first
        of them attends, and its queries, keys and values are returned.

        Args:
            x: [C] float32, changed. v_first: [C] float32, written by the first time mix.
            attended: [C] float32. shifts: of each block of the range, the last inputs of its two
                mixers, each of C elements of the weights' dtype. states: [1, H, N, N] float32 or
                None. caches: of each block of the range. new_shifts: [L, 2, C] float32, written.
            new_states: [L, H, N, N] float32, written.

        Returns:
            [C + 2 G N] float32: queries, keys and values of the attention block that comes next.
        """
        tokens = (x, v_first, torch.empty_like(x))
        return self._table.read(blocks, tokens, shifts, states, caches, new_shifts, new_states)
