"""Sparse blocks: top-k chunk attention without positional encoding.

RWKV-X (arXiv 2504.21463) with the selection of MoBA (arXiv 2502.13189); the key convolution is
that of "Optimizing Mixture of Block Attention" (arXiv 2511.11571).
Axes: B batch, T time, C width, H query heads, G key/value heads, N head size, W convolution width.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from rwkvx.errors import InputError
from rwkvx.kinds.attention import (
    AttentionMixer,
    Cached,
    CachedRows,
    cached_bytes,
    check_cached,
    select_rows,
)
from rwkvx.kinds.contract import Memory, Shape, TokenState
from rwkvx.kinds.parts import attend_part
from rwkvx_kernels.chunk_attention import (
    KeyValueCache,
    cached_chunk_attention,
    chunk_attention,
    has_decode_kernel,
)
from rwkvx_kernels.chunk_attention.api import choose as choose_attention
from rwkvx_kernels.chunk_select.api import choose as choose_select
from rwkvx_kernels.chunk_select.common import scored_whole
from rwkvx_kernels.dispatch import Choice, Facts
from rwkvx_kernels.one_token import BlockWeights, Cache

if TYPE_CHECKING:
    from rwkvx.config import ModelConfig


class SparseState(NamedTuple):
    """Grows with the text.

    `cached` holds keys and values (rwkvx/cache.py). `conv` [B, W - 1, G·N] are the last keys before
    the convolution (None: no convolution), `ffn_shift` [B, C] the last input of the channel mix.
    """

    cached: Cached
    conv: Tensor | None
    ffn_shift: Tensor

    def map(self, f: Callable[[Tensor], Tensor]) -> "SparseState":
        """With `f` applied to every tensor; the cache is kept as it is."""
        conv = None if self.conv is None else f(self.conv)
        return SparseState(self.cached, conv, f(self.ffn_shift))

    def recurrent(self) -> "SparseState":
        """Detached, without the cache."""
        return self.map(Tensor.detach)._replace(cached=())

    def select(self, index: Tensor) -> "SparseState":
        """The rows `index`."""
        picked = self.map(lambda x: x[index])
        return picked._replace(cached=select_rows(self.cached, index))

    def bytes(self) -> int:
        """Memory of the tokens read."""
        conv = 0 if self.conv is None else self.conv.nbytes
        return cached_bytes(self.cached) + conv + self.ffn_shift.nbytes


class SparseAttention(AttentionMixer):
    """The own chunk causally and the best past chunks."""

    State = SparseState
    fields = frozenset(("chunk_size", "topk", "selection", "sparse_kv_heads", "key_conv"))
    prefixes = {"rwkv-x": "moba."}  # noqa: RUF012

    def __init__(self, config: "ModelConfig", position: int) -> None:
        super().__init__(config, position)
        self.topk = config.topk
        if config.key_conv:
            kv_width = config.kv_heads * config.head_size
            self.key_conv = nn.Parameter(torch.empty(config.key_conv, kv_width))

    def forward(
        self,
        x: Tensor,
        state: SparseState,
        v_first: Tensor | None,
        cu_seqlens: Tensor | None = None,
        keep_cache: bool = True,
    ) -> tuple[Tensor, SparseState, Tensor | None]:
        """See `Mixer.forward`."""
        q, k, v, conv = self.receptance(x), self.key(x), self.value(x), state.conv
        if conv is not None:
            if self.sequence is not None:
                conv = self.sequence.before(k[:, k.shape[1] - conv.shape[1] :], conv)
            k, conv = self._convolve(k, conv, cu_seqlens)
        q, k, v = (z.to(q.dtype).unflatten(-1, (-1, self.config.head_size)) for z in (q, k, v))
        y, cached = self.attend(q, k, v, state.cached, cu_seqlens, keep_cache)
        return self.output(y.flatten(-2)), SparseState(cached, conv, state.ffn_shift), v_first

    def attend_whole(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """See `AttentionMixer`."""
        config = self.config
        shape = (config.chunk_size, self.topk)
        if self.sequence is not None:
            return attend_part(q, k, v, *shape, config.selection, self.impl, self.sequence)
        return chunk_attention(q, k, v, *shape, cu_seqlens, self.impl, config.selection)

    def attend_cached(self, q: Tensor, rows: CachedRows) -> Tensor:
        """See `AttentionMixer`."""
        return cached_chunk_attention(q, *rows, self.topk, self.impl, self.config.selection)

    def empty_cache(self, like: Tensor, rows: int, capacity: int = 0) -> KeyValueCache:
        """See `AttentionMixer`."""
        config = self.config
        return KeyValueCache(
            rows, config.kv_heads, config.head_size, config.chunk_size, like, capacity
        )

    def state_shapes(self) -> dict[str, Shape | None]:
        """See `SparseState`."""
        kv_width, taps = self.config.kv_heads * self.config.head_size, self.config.key_conv
        return {"conv": (taps - 1, kv_width) if taps else None, "ffn_shift": (self.config.width,)}

    def fresh_state(self, rows: int, like: Tensor, capacity: int = 0) -> SparseState:
        """See `Mixer.fresh_state`."""
        cached: Cached = ()
        if capacity:  # at once: growing step by step would hold old and new together
            cached = (CachedRows(self.empty_cache(like, rows, capacity), 0),)
        shapes = self.state_shapes()
        tensors = {n: None if x is None else like.new_zeros(rows, *x) for n, x in shapes.items()}
        return SparseState(cached, **tensors)  # type: ignore[arg-type]

    def check_state(self, state: Any, rows: int, like: Tensor) -> None:
        """See `Mixer.check_state`."""
        super().check_state(state, rows, like)
        config = self.config
        sizes = (config.kv_heads, config.head_size, config.chunk_size)
        check_cached(state.cached, rows, *sizes, f"block {self.position}")

    def init_weights(self, generator: torch.Generator) -> None:
        """The convolution starts as the identity."""
        super().init_weights(generator)
        if self.config.key_conv:
            nn.init.zeros_(self.key_conv)
            nn.init.ones_(self.key_conv[-1])

    def token_weights(self, common: BlockWeights) -> BlockWeights | None:
        """All of them."""
        heads = self.config.width // self.config.head_size
        return common._replace(conv=(self._parameters.get("key_conv"),), heads=heads)

    def token_state(self, state: SparseState, keep_cache: bool = True) -> TokenState | None:
        """See `Mixer.token_state`."""
        if len(state.cached) != 1 or not keep_cache:
            return None
        (cache, length), conv = state.cached[0], state.conv
        if isinstance(length, Tensor):  # on the device: a decoder's own, changed in place
            tensors = (cache.k_BGSD, cache.v_BGSD, cache.means_BGCD)
            forest = [] if self.config.selection == "flat" else cache.forest(self.topk)
            place = Cache(*tensors, length, self.topk, conv, conv, forest)
            return TokenState(None, None, place, lambda *_: state)
        chunks = length // self.config.chunk_size
        if self.config.selection != "flat" and chunks > scored_whole(self.topk):
            return None
        dtypes = {x.dtype for x in (cache.k_BGSD, state.ffn_shift, conv) if x is not None}
        if len(dtypes) > 1:
            return None
        cache = cache.reserve(length, length + 1)
        tensors = (cache.k_BGSD, cache.v_BGSD, cache.means_BGCD)
        old = None if conv is None else conv.contiguous()
        new = None if old is None else torch.empty_like(old)

        def after(shift: Tensor, matrix: Tensor | None, ffn_shift: Tensor) -> SparseState:
            cache.appended_elsewhere(length, length + 1)
            return SparseState((CachedRows(cache, length + 1),), new, ffn_shift)

        place = Cache(*tensors, length, self.topk, old, new)
        return TokenState(None, None, place, after)

    def decodes_in_place(self, like: Tensor) -> bool:
        """With the Triton kernel that takes lengths on the device."""
        config = self.config
        queries = like.new_empty(0, 1, config.heads, config.head_size)
        return has_decode_kernel(queries, config.chunk_size)

    def between_tokens(self, state: SparseState, lengths: Sequence[int]) -> None:
        """Trees grow when chunks complete."""
        if self.config.selection != "flat":
            state.cached[0].cache.forest(self.topk, *lengths)

    def route(self, facts: Facts, rows: int, tokens: int) -> dict[str, Choice]:
        """See `Mixer.route`."""
        config = self.config
        selection = choose_select(facts, config.selection, self.impl)
        sizes = (config.chunk_size, self.topk, tokens, config.head_size)
        return {"selection": selection, "attention": choose_attention(facts, *sizes, self.impl)}

    @classmethod
    def part_multiple(cls, config: "ModelConfig") -> int:
        """A part holds whole chunks, and what a key convolution reads."""
        return config.chunk_size * -(-max(1, config.key_conv - 1) // config.chunk_size)

    @classmethod
    def check_config(cls, config: "ModelConfig") -> None:
        """Heads that can be shared."""
        if config.heads % config.kv_heads:
            raise InputError(f"{config.heads} heads are no multiple of {config.kv_heads} kv heads")

    @classmethod
    def describe(cls, config: "ModelConfig") -> str:
        """Chunks and heads."""
        conv = f", key convolution of {config.key_conv}" if config.key_conv else ""
        chunks = f"chunks of {config.chunk_size}, top {config.topk}, {config.selection} selection"
        return f"{chunks}, {config.kv_heads} kv heads{conv}"

    @classmethod
    def memory(cls, config: "ModelConfig", element: int) -> Memory:
        """Keys and values, and one float32 mean of the keys for each chunk."""
        kv_width = config.kv_heads * config.head_size
        constant = (config.width + max(config.key_conv - 1, 0) * kv_width) * element
        return Memory(constant, kv_width * (2 * element + 4 / config.chunk_size))

    @classmethod
    def decode_bytes(cls, config: "ModelConfig", tokens: int, element: int) -> int:
        """Keys and values of the chunks read, and the means of all."""
        kv_width = config.kv_heads * config.head_size
        read = min(tokens, config.topk * config.chunk_size)
        return kv_width * (2 * read * element + 4 * (tokens // config.chunk_size))

    @classmethod
    def flops(cls, config: "ModelConfig", start: int, stop: int) -> dict[str, int]:
        """Flat selection, a product per past chunk and head; scores and values of what is read."""
        chunks, attended, size = 0, 0, config.chunk_size
        for position in range(start, stop):
            past = position // size
            chunks += past
            attended += min(config.topk - 1, past) * size + position % size + 1
        return {"selection": 2 * config.width * chunks, "attention": 4 * config.width * attended}

    @classmethod
    def beyond_layouts(cls, config: "ModelConfig") -> str | None:
        """What RWKV-X does not have."""
        if config.key_conv:
            return "a key convolution"
        return "grouped-query heads" if config.kv_heads != config.heads else None

    def _convolve(
        self, k: Tensor, conv: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Causal depthwise convolution over time; the last of the W taps is the token itself."""
        tokens, before = k.shape[1], conv.shape[1]
        mixed = k * self.key_conv[-1]
        if cu_seqlens is None:
            padded = torch.cat([conv, k], dim=1)
            for tap in range(before):
                mixed = torch.addcmul(mixed, padded[:, tap : tap + tokens], self.key_conv[tap])
            return mixed, padded[:, tokens:].clone()  # a view would hold all keys
        start, length = cu_seqlens[:-1], cu_seqlens.diff()
        token, row = (torch.arange(n, device=k.device) for n in (tokens, len(length)))
        # Not in `cu_seqlens[1:]`: compiled for a GPU by torch 2.11, places were out of bounds, as
        # if that slice began at 0.
        owner = torch.searchsorted(cu_seqlens, token, right=True) - 1
        padded = torch.cat([k[0], conv.flatten(0, 1)])

        def place(at: Tensor, row: Tensor) -> Tensor:
            """Where the key `at` of a sequence stands in `padded`; before the first: at < 0."""
            return (start[row] + at).where(at >= 0, tokens + (row + 1) * before + at)

        for tap in range(before):
            at = place(token - start[owner] - before + tap, owner)
            mixed = torch.addcmul(mixed, padded[at], self.key_conv[tap])
        last = length[:, None] + torch.arange(-before, 0, device=k.device)
        return mixed, padded[place(last, row[:, None])]
