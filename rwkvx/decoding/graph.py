"""Decoding on a GPU: one CUDA graph, replayed for every token.

Blocks are a few launches each (fused.py); launched one by one they would still take longer than
they do. In a graph they are launched at once; in return, everything must stay in its place: tokens
are written where lengths on the device say, into caches with room reserved.
Axes: B batch, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from rwkvx.decoding.fused import form_of
from rwkvx.errors import InputError
from rwkvx.kinds.attention import Cached, CachedRows, DeviceRows
from rwkvx.kinds.contract import tensors_of
from rwkvx.model import Block, Model
from rwkvx.state import ModelState
from rwkvx_kernels.chunk_attention import KeyValueCache

# Steps before capturing: kernels are compiled, libraries take their workspaces.
WARM_UP = 2


def can_capture(model: Model) -> str | None:
    """Why a step of a model is not the same kernels every time; None if it is."""
    if model.device.type != "cuda":
        return f"there are no CUDA graphs on {model.device.type}"
    if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        return "a graph would not call the hooks"
    for block, weights in zip(model.blocks, form_of(model).weights, strict=True):
        if weights is None and not block.att.decodes_in_place(model.emb.weight):
            return f"{type(block.att).__name__} has no kernel here that waits for nothing"
    return None


class GraphDecoder:
    """See `rwkvx.decoding.Decoder`.

    Static: the batch, the room and the memory of the state, which each step updates in place. A
    model that was changed is captured anew. The state given stays valid: caches are shared with it,
    below its length, and whoever else continues it writes to a copy.
    """

    @torch.no_grad()
    def __init__(self, model: Model, state: ModelState, tokens: int) -> None:
        """tokens: how many may be read, at most."""
        self._model, self._read, self._room, self._steps = model, state.length, tokens, 0
        rows, device = state.rows, model.device
        self._lengths = _lengths(state) or [0] * rows
        self._ids = torch.zeros((rows, 1), dtype=torch.int64, device=device)
        self._length = torch.tensor(self._lengths, device=device)
        pairs = zip(model.blocks, state.blocks, strict=True)
        self._state = ModelState(tuple(self._own(block, own) for block, own in pairs), 0)
        self._form = form_of(model)
        self._prepare()

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        """See `Decoder.step`.

        Raises:
            InputError: ids of another shape, no room left.
        """
        if ids.shape != self._ids.shape:
            raise InputError(f"ids must be {list(self._ids.shape)}, got {list(ids.shape)}")
        if self._steps == self._room:
            raise InputError(f"the room for {self._room} tokens is used up")
        if not self._form.watch.holds():
            self._form = form_of(self._model)
            self._prepare()
        self._ids.copy_(ids)
        if self._graph is None:
            logits = self._run()
        else:
            self._graph.replay()
            logits = self._logits.clone()
        self._steps += 1
        self._between_tokens()
        return logits

    @property
    def room(self) -> int:
        """See `Decoder.room`."""
        return self._room - self._steps

    @property
    def state(self) -> ModelState:
        """See `Decoder.state`."""
        blocks = []
        for block in self._state.blocks:
            own = block.map(Tensor.clone)
            if "cached" in own._fields:
                own = own._replace(cached=self._rows(own.cached[0].cache))
            blocks.append(own)
        return ModelState(tuple(blocks), self._read + self._steps)

    def _run(self) -> Tensor:
        """One step: nothing in it depends on a value, and nothing moves."""
        made, new = self._form.step(self._ids, self._state.blocks)
        for own, fresh in zip(_tensors(self._state), _tensors(ModelState(new, 0)), strict=True):
            if own is not fresh:  # of a block that was called as a module
                own.copy_(fresh)
        self._length += 1
        return made

    def _between_tokens(self) -> None:
        """What cannot be in the graph: behind the last step and before the next on their stream."""
        lengths = self._read_by_rows()
        for block, own in zip(self._model.blocks, self._state.blocks, strict=True):
            block.att.between_tokens(own, lengths)

    def _read_by_rows(self) -> list[int]:
        return [length + self._steps for length in self._lengths]

    def _prepare(self) -> None:
        """Capture, where that can be done: where it cannot, steps are launched one by one."""
        self._between_tokens()
        self._graph: torch.cuda.CUDAGraph | None = None
        if can_capture(self._model) is None:
            with torch.cuda.device(self._ids.device):
                self._capture()

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._warm_up()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._run()

    def _warm_up(self) -> None:
        before = [x.clone() for x in (*_tensors(self._state), self._length)]
        for _ in range(WARM_UP):
            self._run()
            # What it wrote to the caches lies behind the lengths, where the first step writes.
            for own, old in zip((*_tensors(self._state), self._length), before, strict=True):
                own.copy_(old)

    def _own(self, block: Block, state: Any) -> Any:
        """A block's state in memory of its own, caches with room."""
        own = state.map(lambda x: x.clone(memory_format=torch.contiguous_format))
        if "cached" not in own._fields:
            return own
        rows: Cached = own.cached
        if len(rows) > 1:
            cache = KeyValueCache.joined(rows, max(self._lengths) + self._room)
        elif rows:
            cache, length = rows[0]
            cache = cache.reserve(length, length + self._room)
        else:
            cache = block.att.empty_cache(own.ffn_shift, len(own.ffn_shift), self._room)
        return own._replace(cached=(DeviceRows(cache, self._length),))

    def _rows(self, cache: KeyValueCache) -> Cached:
        lengths = self._read_by_rows()
        if len(set(lengths)) == 1:
            return (CachedRows(cache, lengths[0]),)
        index = torch.arange(len(lengths), device=cache.k_BGSD.device).split(1)
        return tuple(
            CachedRows(cache.rows(n, row), n) for n, row in zip(lengths, index, strict=True)
        )


def _lengths(state: ModelState) -> list[int]:
    """Tokens in the cache of each row."""
    cached = next((x.cached for x in state.blocks if "cached" in x._fields), ())
    return [rows.length for rows in cached for _ in range(rows.cache.batch)]


def _tensors(state: ModelState) -> list[Tensor]:
    """What a step replaces: everything but the caches."""
    return [x for block in state.blocks for x in tensors_of(block).values()]
