"""Window blocks: every token attends to the last `window` tokens, itself included.

The sliding window of Longformer (arXiv 2004.05150, 3.1) and Mistral, here without positional
encoding like the sparse blocks. With a window as long as the text it is dense causal attention.
Axes: B batch, T time, C width, H query heads, G key/value heads, N head size, S keys.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkvx.errors import InputError
from rwkvx.kinds.attention import (
    AttentionMixer,
    Cached,
    CachedRows,
    cached_bytes,
    check_cached,
    select_rows,
)
from rwkvx.kinds.contract import Memory, Option, Shape
from rwkvx.ranges import Whole
from rwkvx_kernels.chunk_attention import KeyValueCache
from rwkvx_kernels.dispatch import Choice, Facts, check_cu_seqlens

if TYPE_CHECKING:
    from rwkvx.config import ModelConfig

# Queries that are attended together: enough for efficient products, few keys that none may see.
TILE = 512


class WindowState(NamedTuple):
    """`cached` holds the last keys and values, at most twice the window; `ffn_shift` [B, C]."""

    cached: Cached
    ffn_shift: Tensor

    def map(self, f: Callable[[Tensor], Tensor]) -> "WindowState":
        """With `f` applied to the tensor; the cache is kept as it is."""
        return WindowState(self.cached, f(self.ffn_shift))

    def recurrent(self) -> "WindowState":
        """Detached, without the cache."""
        return WindowState((), self.ffn_shift.detach())

    def select(self, index: Tensor) -> "WindowState":
        """The rows `index`."""
        return WindowState(select_rows(self.cached, index), self.ffn_shift[index])

    def bytes(self) -> int:
        """Memory of the tokens held."""
        return cached_bytes(self.cached) + self.ffn_shift.nbytes


class WindowAttention(AttentionMixer):
    """Softmax attention over a causal window, scale 1/sqrt(N)."""

    State = WindowState
    fields = frozenset(("sparse_kv_heads",))
    options = {  # noqa: RUF012
        "window": Option(
            1024,
            Whole(1, 1 << 24),
            "window blocks: tokens that a token attends to, itself included",
        )
    }

    def forward(
        self,
        x: Tensor,
        state: WindowState,
        v_first: Tensor | None,
        cu_seqlens: Tensor | None = None,
        keep_cache: bool = True,
    ) -> tuple[Tensor, WindowState, Tensor | None]:
        """See `Mixer.forward`."""
        projected = (self.receptance(x), self.key(x), self.value(x))
        q, k, v = (z.unflatten(-1, (-1, self.config.head_size)) for z in projected)
        y, cached = self.attend(q, k, v, state.cached, cu_seqlens, keep_cache)
        return self.output(y.flatten(-2)), WindowState(cached, state.ffn_shift), v_first

    def attend_whole(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """See `AttentionMixer`."""
        if self.sequence is not None:
            both = self.sequence.joined_before(torch.cat([k, v], dim=-1), self.window - 1)
            k, v = both.split(k.shape[-1], dim=-1)
        if cu_seqlens is None:
            return window_attention(q, k, v, self.window)
        bounds = [(a, b) for a, b in pairwise(check_cu_seqlens(cu_seqlens, *q.shape[:2])) if a < b]
        each = [(q[:, a:b], k[:, a:b], v[:, a:b]) for a, b in bounds]
        parts = [window_attention(*sequence, self.window) for sequence in each]
        return torch.cat(parts, dim=1)

    def attend_cached(self, q: Tensor, rows: CachedRows) -> Tensor:
        """See `AttentionMixer`."""
        cache, length = rows
        first = max(0, length - q.shape[1] - self.window + 1)
        k, v = (x[:, :, first:length].transpose(1, 2) for x in (cache.k_BGSD, cache.v_BGSD))
        return window_attention(q, k, v, self.window)

    def kept(self, rows: CachedRows) -> CachedRows:
        """The last window - 1 tokens, once there are twice as many: each is copied about once."""
        cache, length = rows
        held = self.window - 1
        if length < 2 * self.window:
            return rows
        last = slice(length - held, length)
        k, v = (x[:, :, last].transpose(1, 2) for x in (cache.k_BGSD, cache.v_BGSD))
        return CachedRows(self.empty_cache(k, len(k), 2 * self.window), 0).append(k, v)

    def empty_cache(self, like: Tensor, rows: int, capacity: int = 0) -> KeyValueCache:
        """See `AttentionMixer`; its means of chunks are not used."""
        config = self.config
        return KeyValueCache(rows, config.kv_heads, config.head_size, self.window, like, capacity)

    @property
    def window(self) -> int:
        """Tokens that a token attends to."""
        return self.config.option("window")

    def state_shapes(self) -> dict[str, Shape | None]:
        """See `WindowState`."""
        return {"ffn_shift": (self.config.width,)}

    def fresh_state(self, rows: int, like: Tensor, capacity: int = 0) -> WindowState:
        """See `Mixer.fresh_state`."""
        return WindowState((), like.new_zeros(rows, self.config.width))

    def check_state(self, state: Any, rows: int, like: Tensor) -> None:
        """See `Mixer.check_state`."""
        super().check_state(state, rows, like)
        sizes = (self.config.kv_heads, self.config.head_size, self.window)
        check_cached(state.cached, rows, *sizes, f"block {self.position}")

    def route(self, facts: Facts, rows: int, tokens: int) -> dict[str, Choice]:
        """One form, on every device."""
        return {"attention": Choice("torch", "scaled_dot_product_attention is the only form")}

    @classmethod
    def check_config(cls, config: "ModelConfig") -> None:
        """Heads that can be shared."""
        if config.heads % config.kv_heads:
            raise InputError(f"{config.heads} heads are no multiple of {config.kv_heads} kv heads")

    @classmethod
    def describe(cls, config: "ModelConfig") -> str:
        """Window and heads."""
        return f"windows of {config.option('window')}, {config.kv_heads} kv heads"

    @classmethod
    def memory(cls, config: "ModelConfig", element: int) -> Memory:
        """Keys and values of up to two windows."""
        kv_width, window = config.kv_heads * config.head_size, config.option("window")
        return Memory(config.width * element, 2 * kv_width * element, 2 * window)

    @classmethod
    def decode_bytes(cls, config: "ModelConfig", tokens: int, element: int) -> int:
        """Keys and values of the window."""
        read = min(tokens, config.option("window"))
        return 2 * read * config.kv_heads * config.head_size * element

    @classmethod
    def flops(cls, config: "ModelConfig", start: int, stop: int) -> dict[str, int]:
        """Scores and values of what is read."""
        window = config.option("window")
        attended = sum(min(position + 1, window) for position in range(start, stop))
        return {"attention": 4 * config.width * attended}


def window_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Attention of the last T of S tokens, each to the `window` tokens that end with itself.

    Args:
        q: [B, T, H, N]. k, v: [B, S, G, N], S >= T; those before the first query's window are
            never read.

    Returns:
        [B, T, H, N], differentiable.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    tokens, before = q.shape[2], k.shape[2] - q.shape[2]
    outputs = []
    for start in range(0, tokens, TILE):
        stop = min(start + TILE, tokens)
        first = max(0, before + start + 1 - window)
        keys, values = (x[:, :, first : before + stop] for x in (k, v))
        query = torch.arange(before + start, before + stop, device=q.device)[:, None]
        key = torch.arange(first, before + stop, device=q.device)
        seen = (key <= query) & (key > query - window)
        part = q[:, :, start:stop]
        y = F.scaled_dot_product_attention(part, keys, values, attn_mask=seen, enable_gqa=True)
        outputs.append(y.transpose(1, 2))
    return torch.cat(outputs, dim=1) if outputs else q.transpose(1, 2)
