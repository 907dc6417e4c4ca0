"""Reading a single token on a CPU without gradients: the same blocks, compiled.

Decoding is bound by reading the weights; called one by one, the operations of a token cost as much
again. Axes: C width, L blocks, H heads, N head size.
"""

from __future__ import annotations

from itertools import chain, groupby
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from rwkvx.channel_mix import ChannelMix
from rwkvx.linear import Linear
from rwkvx.sparse_attention import SparseAttention
from rwkvx.state import BlockState, CachedRows, ModelState, Rwkv7State, SparseState
from rwkvx.time_mix import MIXES, TimeMix
from rwkvx_kernels.one_token import BlockWeights, Cache, OneToken, fits

if TYPE_CHECKING:
    from rwkvx.model import Model

PLAIN = (Linear, TimeMix, SparseAttention, ChannelMix, nn.LayerNorm, nn.GroupNorm)


class OneTokenReader:
    """A model's blocks as compiled code sees them; made anew when a weight or module changes."""

    def __init__(self) -> None:
        self._seen: Seen | None = None
        self._compiled: OneToken | None = None

    def __reduce__(self) -> tuple[type[OneTokenReader], tuple[()]]:
        return OneTokenReader, ()  # a copy of a model looks at its own weights

    def can_read(self, model: Model, x: Tensor, state: ModelState) -> bool:
        """Whether `x` [B, T, C] is one token that compiled code gives what the modules give."""
        if not fits(x, model.config.width) or model.recurrent_pieces != 1:
            return False
        self._look_at(model)
        return self._compiled is not None and all(_is_plain(block, x) for block in state.blocks)

    def read(
        self, model: Model, x: Tensor, state: ModelState, keep_cache: bool
    ) -> tuple[Tensor, ModelState]:
        """x [1, 1, C] after all blocks, and the new state."""
        assert self._compiled is not None
        stream, v_first = x.float().flatten().clone(), torch.empty(model.config.width)
        rooms = [_room(*pair, keep_cache) for pair in zip(model.blocks, state.blocks, strict=True)]
        new: list[BlockState] = []
        apart = [
            isinstance(block, SparseState) and room is None
            for block, room in zip(state.blocks, rooms, strict=True)
        ]
        for is_apart, indices in groupby(range(len(apart)), apart.__getitem__):
            if not is_apart:
                new += self._run(list(indices), stream, v_first, state, rooms, x.dtype)
                continue
            for i in indices:  # its attention is not compiled
                token = stream.to(x.dtype).view(1, 1, -1)
                y, own, _ = model.blocks[i](token, state.blocks[i], None, None, keep_cache)
                stream.copy_(y.flatten())
                new.append(own)
        return stream.to(x.dtype).view(1, 1, -1), ModelState(tuple(new), state.length + 1)

    def _run(
        self,
        indices: list[int],
        stream: Tensor,
        v_first: Tensor,
        state: ModelState,
        rooms: list[Room | None],
        dtype: torch.dtype,
    ) -> list[BlockState]:
        """The stream through consecutive compiled blocks, in place: their new states."""
        assert self._compiled is not None
        blocks, part = [state.blocks[i] for i in indices], [rooms[i] for i in indices]
        states = [b.wkv if isinstance(b, Rwkv7State) else None for b in blocks]
        wkv = [None if x is None else torch.empty_like(x) for x in states]
        shifts = torch.empty(len(indices), 2, len(stream))
        self._compiled.read(
            range(indices[0], indices[-1] + 1), stream, v_first,
            [_shifts(block) for block in blocks], states,
            [None if room is None else room.cache for room in part], shifts, wkv,
        )  # fmt: skip
        shifts = shifts.to(dtype).unsqueeze(2)
        return [
            SparseState(*room.filled(), shifts[i, 1])
            if room is not None
            else Rwkv7State(shifts[i, 0], cast(Tensor, wkv[i]), shifts[i, 1])
            for i, room in enumerate(part)
        ]

    def _look_at(self, model: Model) -> None:
        if self._seen is not None and self._seen.is_true():
            return
        self._seen = Seen([m for block in model.blocks for m in _compiled_modules(block)])
        self._compiled = None
        if not self._seen.hooks_set and self._seen.types <= {type(model.blocks[0]), *PLAIN}:
            weights = [_weights(block) for block in model.blocks]
            if all(x.fit(model.dtype) for x in weights):
                self._compiled = OneToken(weights)


class Room(NamedTuple):
    """The place of a token in an attention block's cache."""

    rows: CachedRows
    cache: Cache

    def filled(self) -> tuple[tuple[CachedRows, ...], Tensor | None]:
        """What the block has read when the token is there."""
        cache, length = self.rows
        cache.appended_elsewhere(length, length + 1)
        return (CachedRows(cache, length + 1),), self.cache.new_conv


def _room(block: Any, own: BlockState, keep_cache: bool) -> Room | None:
    """None for an RWKV-7 block, and where compiled code does not attend."""
    if not isinstance(own, SparseState) or len(own.cached) != 1:
        return None
    (cache, length), like, conv = own.cached[0], own.ffn_shift, own.conv
    plain = all(x.dtype == like.dtype for x in (cache.k_BGSD, like if conv is None else conv))
    plain = plain and isinstance(length, int)  # not one that lies on the device
    if not plain or not keep_cache or block.att.config.selection != "flat":
        return None
    cache = cache.reserve(length, length + 1)
    tensors = (cache.k_BGSD, cache.v_BGSD, cache.means_BGCD)
    old = None if conv is None else conv.contiguous()
    new = None if old is None else torch.empty_like(old)
    return Room(CachedRows(cache, length), Cache(*tensors, length, block.att.topk, old, new))


class Seen:
    """What was true of some modules: where weights lie, which children they have, no hooks."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.types = {type(m) for m in modules}
        tables = [table for m in modules for table in (m._parameters, m._modules)]
        self._tables: list[dict[str, Any]] = [table for table in tables if table]
        self._objects = self._look_objects()
        self._tensors = [x for x in self._objects if isinstance(x, Tensor)]
        self._places = self._look_places()
        self._hooks = [h for m in modules for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._own = [vars(m) for m in modules]
        self.hooks_set = self._look_hooks()

    def is_true(self) -> bool:
        """Whether it still is. Asked for every token, hence no loop of Python over weights."""
        objects = self._look_objects()
        return (
            len(objects) == len(self._objects)
            and all(map(is_, objects, self._objects))
            and self._look_places() == self._places
            and self._look_hooks() == self.hooks_set
        )

    def _look_objects(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self._tables)))

    def _look_places(self) -> list[int]:
        return list(map(Tensor.data_ptr, self._tensors))

    def _look_hooks(self) -> bool:
        return any(self._hooks) or any("forward" in own for own in self._own)


def _compiled_modules(block: Any) -> list[nn.Module]:
    """The block itself, and what compiled code does in place of its modules."""
    return [block, block.ln1, block.ln2, *block.ffn.modules(), *block.att.modules()]


def _weights(block: Any) -> BlockWeights:
    att, ffn = block.att, block.ffn
    products = [att.receptance, att.key, att.value, att.output]
    common = BlockWeights(
        heads=block.config.heads,
        eps=(block.ln1.eps, block.ln2.eps, 0.0),
        ln1=(block.ln1.weight, block.ln1.bias),
        ln2=(block.ln2.weight, block.ln2.bias),
        channel=(ffn.x_k, ffn.key.weight, ffn.value.weight),
        channel_scales=(ffn.key.scale, ffn.value.scale),
        matrices=tuple(m.weight for m in products),
        scales=tuple(m.scale for m in products),
    )
    if block.kind == "sparse":
        return common._replace(conv=(att._parameters.get("key_conv"),))
    own = att._parameters
    return common._replace(
        eps=(*common.eps[:2], att.ln_x.eps),
        mixes=tuple(own[f"x_{name}"] for name in MIXES),
        down=tuple(own.get(f"{name}1") for name in "wavg"),
        up=tuple(own.get(f"{name}2") for name in "wavg"),
        vectors=(
            *(own.get(name) for name in ("w0", "a0", "v0", "k_k", "k_a", "r_k")),
            att.ln_x.weight,
            att.ln_x.bias,
        ),
    )


def _shifts(block: BlockState) -> tuple[Tensor, Tensor]:
    """The last inputs of the two mixers; attention has none, and nobody looks."""
    return block.shift if isinstance(block, Rwkv7State) else block.ffn_shift, block.ffn_shift


def _is_plain(block: BlockState, x: Tensor) -> bool:
    tensors = (
        (block.shift, block.ffn_shift) if isinstance(block, Rwkv7State) else (block.ffn_shift,)
    )
    if isinstance(block, Rwkv7State) and not block.wkv.is_contiguous():
        return False
    return all(t.dtype == x.dtype and t.is_contiguous() for t in tensors)
