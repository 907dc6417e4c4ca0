"""What one token through a block needs: weights, what was read before, and where they lie.

Axes: C width, H heads, D head size, G key/value heads, F inner width of the channel mix, S tokens
that a cache has room for, W width of the key convolution.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class BlockWeights(NamedTuple):
    """Weights of one block, contiguous, of one dtype and on one device.

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

    def fit(self, like: Tensor) -> bool:
        """Whether they are as said above, of dtype and device of `like`, of shapes that fit."""
        if any(x is None for x in (*self.ln1, *self.ln2)):  # norms without a bias
            return False
        matrices = (*self.channel[1:], *self.matrices)
        scales = (*self.channel_scales, *self.scales)
        dtype = like.dtype
        kind = torch.int8 if self.channel_scales[0] is not None else dtype
        expected = {id(x): kind for x in matrices} | {id(x): torch.float32 for x in scales}
        alike = all(
            x.dtype == expected.get(id(x), dtype) and x.is_contiguous() and x.device == like.device
            for x in self.tensors()
            if x is not None
        )
        return alike and self._shapes_fit()

    @property
    def size(self) -> int:
        """N."""
        return len(self.ln1[0]) // self.heads

    @property
    def kv_width(self) -> int:
        """G N."""
        key = self.matrices[1]
        return 0 if key is None else len(key)

    def _shapes_fit(self) -> bool:
        width, inner, kv = len(self.ln1[0]), len(self.channel[1]), self.kv_width
        if self.heads < 1 or width % self.heads or not kv or kv % self.size:
            return False
        if self.heads % (kv // self.size) or (self.mixes[0] is not None and kv != width):
            return False
        ranks = [0 if x is None else x.shape[-1] for x in self.down]
        vectors = (*self.ln1, *self.ln2, self.channel[0], *self.mixes, *self.vectors)
        shapes = [
            *((x, width) for x in vectors),
            *zip(self.channel[1:], ((inner, width), (width, inner)), strict=True),
            *zip(self.channel_scales, (inner, width), strict=True),
            *zip(self.matrices, ((width, width), *[(kv, width)] * 2, (width, width)), strict=True),
            *zip(self.scales, (width, kv, kv, width), strict=True),
            *zip(self.down, ((width, rank) for rank in ranks), strict=True),
            *zip(self.up, ((rank, width) for rank in ranks), strict=True),
            *((x, (len(x), kv)) for x in self.conv if x is not None),
        ]
        return all(
            x is None or (x.numel() == shape if isinstance(shape, int) else x.shape == shape)
            for x, shape in shapes
        )


class Cache(NamedTuple):
    """What an attention block has read of B rows, contiguous and of the weights' dtype.

    The token is written to `position`; it attends to `topk` chunks, which are selected flat where
    there is no forest. Compiled code, of one row and without a forest, leaves the mean of a chunk
    that the token completes to the caller.
    """

    k: Tensor  # [B, G, S, D]
    v: Tensor
    means: Tensor  # [B, G, chunks, D] float32
    position: int | Tensor  # [B] int64 on a GPU, where nobody knows it before
    topk: int
    conv: Tensor | None = None  # [B, W - 1, G D], keys before the convolution
    new_conv: Tensor | None = None  # the same, written; on a GPU it may be the same memory
    forest: list[Tensor] = []  # noqa: RUF012  # to select coarse to fine (chunk_select/forest.py)

    def check(self, block: BlockWeights, rows: int = 1) -> None:
        """Refuse a cache that is not of that block, and a position known to be beyond its end.

        Raises:
            ValueError: it is one.
        """
        _, groups, tokens, size = self.k.shape
        chunks = self.means.shape[2]
        taps = 0 if block.conv[0] is None else len(block.conv[0]) - 1
        conv = None if block.conv[0] is None else (rows, taps, block.kv_width)
        fits = (
            (rows, groups * size, size) == (len(self.k), block.kv_width, block.size)
            and self.v.shape == self.k.shape
            and self.means.shape == (rows, groups, chunks, size)
            and tokens % chunks == 0
            and all((None if x is None else x.shape) == conv for x in (self.conv, self.new_conv))
            and all(x.shape[1] == rows * groups for x in self.forest)
            and (not self.forest or self.forest[0].shape[2] == chunks)
        )
        if isinstance(self.position, Tensor):
            fits = fits and self.position.shape == (rows,)
        else:
            fits = fits and 0 <= self.position < tokens
        if not fits:
            raise ValueError(
                f"a cache of {list(self.k.shape)} and a place {self.position} do not fit a block "
                f"of {block.kv_width} channels in heads of {block.size}"
            )


class Memory(NamedTuple):
    """What a block has read of B rows, on a GPU: changed in place, contiguous."""

    shift: Tensor | None  # [B, C] last input of the mixer, of one that has such a thing
    matrix: Tensor | None  # [B, H, D, D] float32, of a time mix
    ffn_shift: Tensor  # [B, C]
    cache: Cache | None  # of an attention

    def check(self, block: BlockWeights, rows: int) -> None:
        """Refuse what is not of that block and so many rows: kernels would read elsewhere.

        Raises:
            ValueError: it is not.
        """
        width, heads, size = len(block.ln1[0]), block.heads, block.size
        mixes = block.mixes[0] is not None
        expected = (
            (self.shift, (rows, width) if mixes else None),
            (self.matrix, (rows, heads, size, size) if mixes else None),
            (self.ffn_shift, (rows, width)),
        )
        fits = (self.cache is None) == mixes
        for x, shape in expected:
            fits = fits and (None if x is None else x.shape) == shape
            fits = fits and (x is None or x.is_contiguous())
        if not fits:
            raise ValueError(f"memory does not fit a block of {width} channels and {rows} rows")
        if self.cache is not None:
            self.cache.check(block, rows)
