"""What the kinds of block that attend share: projections, and caches of keys and values.

Axes: B batch, T time, H query heads, G key/value heads, N head size.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from rwkvx.errors import InputError
from rwkvx.kinds.contract import Mixer, orthogonal
from rwkvx.layers import Linear
from rwkvx_kernels.chunk_attention import KeyValueCache

if TYPE_CHECKING:
    from rwkvx.config import ModelConfig

UNDEFINED = (
    "gradients do not flow into a filled attention cache: start from state.recurrent(), or run "
    "under torch.no_grad()"
)


class CachedRows(NamedTuple):
    """Batch rows of equal length: of what `cache` holds, `length` tokens count here."""

    cache: KeyValueCache
    length: int

    def append(self, k_BTGN: Tensor, v_BTGN: Tensor) -> "CachedRows":
        """With T more tokens."""
        cache = self.cache.append(self.length, k_BTGN, v_BTGN)
        return CachedRows(cache, self.length + k_BTGN.shape[1])

    def select(self, index: Tensor) -> "CachedRows":
        """A copy of the rows `index`."""
        return CachedRows(self.cache.rows(self.length, index), self.length)


class DeviceRows(NamedTuple):
    """As `CachedRows`, with the length of each row on the device: [B] int64."""

    cache: KeyValueCache
    length: Tensor

    def append(self, k_BTGN: Tensor, v_BTGN: Tensor) -> "DeviceRows":
        """With one more token in each row, in place."""
        self.cache.append_each(self.length, k_BTGN, v_BTGN)
        return DeviceRows(self.cache, self.length + 1)


# Rows of equal length that are attended together, then the next such rows; or every row by itself,
# where lengths may differ. Nothing read yet: none.
Cached = tuple[CachedRows, ...]
# Queries, keys and values of some rows beside what they continue.
Part = tuple[Tensor, Tensor, Tensor, CachedRows]


def select_rows(cached: Cached, index: Tensor) -> Cached:
    """Rows together are copied; single rows are shared, and copied when one is continued."""
    if len(cached) == 1:
        return (cached[0].select(index),)
    return tuple(cached[i] for i in index.tolist()) if cached else ()


def cached_bytes(cached: Cached) -> int:
    """Memory of the tokens that count."""
    return sum(int(x.cache.bytes_per_token() * x.length * x.cache.batch) for x in cached)


def is_filled(cached: Cached) -> bool:
    """Whether tokens were read before; looks at the device where lengths are kept there."""
    return any(bool(length) for _, length in cached)


def parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cached: Cached,
    cu_seqlens: Tensor | None,
    empty: Callable[[Tensor, int], KeyValueCache],
) -> list[Part]:
    """Queries, keys and values beside what they continue: packed sequences one by one, rows of a
    batch in the groups that were cached together.

    empty: makes a cache like a tensor, for so many rows.
    """
    if cu_seqlens is None:
        cached = cached or (CachedRows(empty(k, len(k)), 0),)
        sizes, dim = [rows.cache.batch for rows in cached], 0
    else:
        if torch.compiler.is_compiling():  # lengths are values, which it cannot look at
            raise InputError("compiled, packed sequences keep no cache: keep_cache=False")
        sizes, dim = cu_seqlens.diff().tolist(), 1
        if not cached:
            cached = tuple(CachedRows(empty(k, 1), 0) for _ in sizes)
        elif len(cached) < len(sizes):
            rows = torch.arange(len(sizes), device=k.device).split(1)
            cached = tuple(cached[0].select(row) for row in rows)
    if len(cached) == 1:
        return [(q, k, v, cached[0])]
    return list(zip(*(x.split(sizes, dim) for x in (q, k, v)), cached, strict=True))


def check_cached(cached: Cached, rows: int, heads: int, size: int, chunk: int, where: str) -> None:
    """Refuse the cache of another model, which would be read as something else.

    Raises:
        InputError: other heads or chunks, another number of rows.
    """
    for cache, _ in cached:
        found = (cache.k_BGSD.shape[1], cache.k_BGSD.shape[3], cache.chunk_size)
        if found != (heads, size, chunk):
            raise InputError(
                f"the state of {where} does not fit this model: its cache is of {found[0]} heads "
                f"of {found[1]} in chunks of {found[2]}, expected {heads} of {size} in {chunk}"
            )
    total = sum(cache.batch for cache, _ in cached)
    if cached and total != rows:
        raise InputError(f"the state of {where} holds {total} sequences, the model reads {rows}")


class _WithoutGradient(torch.autograd.Function):
    """What was computed without a gradient: refuses to have one, but only when it is asked."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, like: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise InputError(UNDEFINED)


class AttentionMixer(Mixer):
    """Queries (`receptance`), keys and values; what the kinds that attend have in common."""

    def __init__(self, config: "ModelConfig", position: int) -> None:
        super().__init__(config, position)
        kv_width = config.kv_heads * config.head_size
        self.receptance = Linear(config.width, config.width)
        self.key = Linear(config.width, kv_width)
        self.value = Linear(config.width, kv_width)
        self.output = Linear(config.width, config.width)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cached: Cached, cu_seqlens: Tensor | None, keep: bool
    ) -> tuple[Tensor, Cached]:
        """q [B, T, H, N], k and v [B, T, G, N] -> [B, T, H, N], cached.

        Gradients through a filled cache are not defined: asking for them is an InputError.
        """
        training = torch.is_grad_enabled() and q.requires_grad
        if training and is_filled(cached):
            if torch.compiler.is_compiling():
                raise InputError(UNDEFINED)
            with torch.no_grad():
                y, cached = self.attend(q, k, v, cached, cu_seqlens, keep)
            return _WithoutGradient.apply(y, q), cached
        if training or not (keep or is_filled(cached)):
            y = self.attend_whole(q, k, v, cu_seqlens)
            k, v = k.detach(), v.detach()
            found = parts(q, k, v, cached, cu_seqlens, self.empty_cache) if keep else []
            return y, tuple(self.kept(old.append(k, v)) for _, k, v, old in found)
        outputs, new = [], []
        for part_q, part_k, part_v, old in parts(q, k, v, cached, cu_seqlens, self.empty_cache):
            rows = old.append(part_k, part_v)
            outputs.append(self.attend_cached(part_q, rows))
            new.append(self.kept(rows))
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 0 if cu_seqlens is None else 1)
        return y, tuple(new)

    def attend_whole(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """Sequences from their first token on, differentiable."""
        raise NotImplementedError

    def attend_cached(self, q: Tensor, rows: CachedRows) -> Tensor:
        """The last tokens of what was read; no gradient."""
        raise NotImplementedError

    def kept(self, rows: CachedRows) -> CachedRows:
        """What of the tokens read later ones may attend to."""
        return rows

    def init_weights(self, generator: torch.Generator) -> None:
        """As RWKV-7's projections, with keys of gain 1: scores of unit scale. No output yet."""
        for linear in (self.receptance, self.key, self.value):
            orthogonal(linear.weight, 1.0, generator)
        nn.init.zeros_(self.output.weight)
