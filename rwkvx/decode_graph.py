"""One token at a time with static shapes, on a GPU replayed as a CUDA graph.

A decoded token is hundreds of small kernels, and launching them takes longer than they do. In a
graph they are launched at once; in return, everything must stay in its place: tokens are
written where lengths on the device say, into caches with room reserved.
Axes: B batch, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from rwkvx.errors import InputError
from rwkvx.model import Model
from rwkvx.state import BlockState, CachedRows, ModelState, Rwkv7State, SparseState, map_tensors
from rwkvx_kernels import wkv7
from rwkvx_kernels.chunk_attention import KeyValueCache, has_decode_kernel

# Capturing costs about as much as some steps.
WORTHWHILE = 32
# Steps before capturing: kernels are compiled, libraries take their workspaces.
WARM_UP = 2


def one_token_steps(model: Any, state: Any, tokens: int) -> Callable[[Tensor], Tensor]:
    """How to read one token after the other, of which there are `tokens` at most.

    Args:
        model: `Model`, or anything called as ``model(ids, state, logits="last")``.
        state: after the prompt; it stays valid.

    Returns:
        a function from ids [B, 1] to the logits [B, 1, V] after them: by a CUDA graph where that
        is possible and worthwhile, otherwise by calling the model.
    """
    if tokens >= WORTHWHILE and isinstance(model, Model) and can_capture(model):
        return DecodeGraph(model, state, tokens).step

    def step(ids: Tensor) -> Tensor:
        nonlocal state
        logits, state = model(ids, state, logits="last")
        return cast(Tensor, logits)

    return step


def can_capture(model: Model) -> bool:
    """Whether a step of this model is the same kernels every time: on a GPU, with Triton's."""
    config, weight = model.config, model.emb.weight
    if weight.device.type != "cuda" or model.recurrent_pieces != 1:
        return False
    if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        return False  # a graph would not call them
    sizes = (config.head_size, config.head_size)
    kinds = set(config.pattern)
    queries = weight.new_empty(0, 1, config.heads, config.head_size)
    return (
        "rwkv7" not in kinds
        or wkv7.chosen_impl(weight.device, "auto", weight.dtype, sizes) == "triton"
    ) and ("sparse" not in kinds or has_decode_kernel(queries, config.chunk_size, config.selection))


class DeviceRows(NamedTuple):
    """As `CachedRows`, with the length of each row on the device: [B] int64."""

    cache: KeyValueCache
    length: Tensor

    def append(self, k_BTGD: Tensor, v_BTGD: Tensor) -> "DeviceRows":
        """With one more token in each row, in place."""
        self.cache.append_each(self.length, k_BTGD, v_BTGD)
        return DeviceRows(self.cache, self.length + 1)


class DecodeGraph:
    """The continuation of a state, token by token.

    Static: the batch, the room, `topk`, where the weights lie and the memory of the state, which
    each step updates in place. The state given stays valid: caches are shared with it,
    below its length, and whoever else continues it writes to a copy.
    """

    @torch.no_grad()
    def __init__(self, model: Model, state: ModelState, tokens: int) -> None:
        """tokens: how many may be read, at most."""
        self._model, self._read, self._room, self._steps = model, state.length, tokens, 0
        rows = len(state.blocks[0].ffn_shift)
        sparse = (b for b in state.blocks if isinstance(b, SparseState))
        self._lengths = _lengths(next(sparse, None), rows)
        device = model.device
        self._ids = torch.zeros((rows, 1), dtype=torch.int64, device=device)
        self._length = torch.tensor(self._lengths, device=device)
        self._state = ModelState(tuple(self._own(b) for b in state.blocks), 0)
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            with torch.cuda.device(device):
                self._capture()

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        """Read ids [B, 1]: the logits after them, [B, 1, V].

        Raises:
            InputError: ids of another shape, no room left.
        """
        if ids.shape != self._ids.shape:
            raise InputError(f"ids must be {list(self._ids.shape)}, got {list(ids.shape)}")
        if self._steps == self._room:
            raise InputError(f"the room for {self._room} tokens is used up")
        self._ids.copy_(ids)
        self._steps += 1
        if self._graph is None:
            return self._run()
        self._graph.replay()
        return self._logits.clone()

    def state(self) -> ModelState:
        """After the tokens read so far; further steps leave it as it is."""
        blocks = []
        for block in self._state.blocks:
            own = map_tensors(block, Tensor.clone)
            if isinstance(own, SparseState):
                own = own._replace(cached=self._rows(own.cached[0].cache))
            blocks.append(own)
        return ModelState(tuple(blocks), self._read + self._steps)

    def _run(self) -> Tensor:
        """One step: nothing in it depends on a value, and nothing moves."""
        logits, new = self._model(self._ids, self._state, logits="last")
        for own, fresh in zip(_tensors(self._state), _tensors(new), strict=True):
            own.copy_(fresh)
        self._length += 1
        return cast(Tensor, logits)

    def _capture(self) -> None:
        before = [x.clone() for x in (*_tensors(self._state), self._length)]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._run()
                # What it wrote to the caches lies behind the lengths, where the first step writes.
                for own, old in zip((*_tensors(self._state), self._length), before, strict=True):
                    own.copy_(old)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._run()

    def _own(self, block: BlockState) -> BlockState:
        """A block's state in memory of its own, caches with room."""
        own = map_tensors(block, Tensor.clone)
        if isinstance(own, Rwkv7State):
            return own
        rows = own.cached
        if len(rows) > 1:
            cache = KeyValueCache.joined(rows, max(self._lengths) + self._room)
        else:
            if not rows:
                config, batch = self._model.config, len(own.ffn_shift)
                sizes = (batch, config.kv_heads, config.head_size, config.chunk_size)
                rows = (CachedRows(KeyValueCache(*sizes, own.ffn_shift, self._room), 0),)
            cache, length = rows[0]
            cache = cache.reserve(length, length + self._room)
        static: Any = DeviceRows(cache, self._length)
        return own._replace(cached=(static,))

    def _rows(self, cache: KeyValueCache) -> tuple[CachedRows, ...]:
        lengths = [length + self._steps for length in self._lengths]
        if len(set(lengths)) == 1:
            return (CachedRows(cache, lengths[0]),)
        index = torch.arange(len(lengths), device=cache.k_BGSD.device).split(1)
        return tuple(
            CachedRows(cache.rows(n, row), n) for n, row in zip(lengths, index, strict=True)
        )


def _lengths(block: SparseState | None, rows: int) -> list[int]:
    """Tokens in the cache of each row."""
    cached = block.cached if block else ()
    return [x.length for x in cached for _ in range(x.cache.batch)] or [0] * rows


def _tensors(state: ModelState) -> list[Tensor]:
    """What a step replaces: everything but the caches."""
    return [x for block in state.blocks for x in block if isinstance(x, Tensor)]
