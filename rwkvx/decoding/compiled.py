"""Decoding on a CPU: runs of blocks in one compiled call (kernels/one_token).

A decoded token is bound by reading the weights; called one by one, the operations of a block cost
as much again. Axes: C width, L blocks, H heads, N head size.
"""

from collections.abc import Callable
from itertools import chain
from operator import attrgetter, is_
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rwkvx.kinds import KINDS
from rwkvx.kinds.contract import TokenState
from rwkvx.layers import ChannelMix, Linear
from rwkvx.model import Block, Model
from rwkvx.state import ModelState
from rwkvx_kernels.one_token import BlockWeights, OneToken
from rwkvx_kernels.one_token.common import DTYPES

# Modules whose forward compiled code does; anything else (an adapter's) is called.
PLAIN = {Block, Linear, ChannelMix, nn.LayerNorm, nn.GroupNorm, *KINDS.values()}


def can_compile(model: Model, rows: int) -> str | None:
    """Why compiled code cannot decode so many rows of a model; None if it can."""
    if rows != 1:
        return "several rows share the reading of weights: products of matrices are faster"
    if model.dtype not in DTYPES:
        return f"compiled code has no {str(model.dtype).removeprefix('torch.')}"
    if torch.is_autocast_enabled("cpu"):
        return "autocast chooses dtypes"
    if torch.compiler.is_compiling():
        return "torch.compile traces the modules"
    return None if any(form_of(model).weights) else "compiled code has none of these blocks"


class CompiledDecoder:
    """See `rwkvx.decoding.Decoder`; of one row."""

    room = None

    def __init__(self, model: Model, state: ModelState) -> None:
        self.model, self.state = model, state

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        """See `Decoder.step`."""
        model = self.model
        logits: Tensor | None
        if model.recurrent_pieces != 1 or can_compile(model, ids.numel()):  # was changed meanwhile
            logits, self.state = model(ids, self.state, logits="last")
            assert logits is not None
            return logits
        model.check_ids(ids)
        x, blocks = form_of(model).read(model.ln0(model.emb(ids)), self.state.blocks)
        self.state = ModelState(blocks, self.state.length + 1)
        return model.head(model.ln_out(x))


class CompiledModel:
    """A model's blocks as compiled code sees them, as long as `watch.holds()`.

    weights: of each block; None for a block that is called as a module.
    """

    def __init__(self, model: Model) -> None:
        blocks = list(model.blocks)
        self.blocks, self.width = blocks, model.config.width
        self.watch = Watch([list(block.modules()) for block in blocks])
        self.weights = [
            _weights(block, model.dtype) if plain else None
            for block, plain in zip(blocks, self.watch.plain, strict=True)
        ]
        compiled = [weights for weights in self.weights if weights is not None]
        self.compiled = OneToken(compiled) if compiled else None

    def read(self, x: Tensor, states: tuple[Any, ...]) -> tuple[Tensor, tuple[Any, ...]]:
        """x [1, 1, C] through all blocks, and their new states."""
        tokens = [
            block.att.token_state(state) if weights and _is_plain(state, x.dtype) else None
            for block, state, weights in zip(self.blocks, states, self.weights, strict=True)
        ]
        stream, v_first, start = x.float().flatten().clone(), torch.empty(self.width), 0
        first: Tensor | None = None  # v_first as modules take it, once it is there
        new: list[Any] = []
        while start < len(tokens):
            stop = next((i for i in range(start, len(tokens)) if tokens[i] is None), len(tokens))
            if stop > start:
                new += self._run(range(start, stop), stream, v_first, states, tokens)
                if first is None and any(t and t.matrix is not None for t in tokens[start:stop]):
                    first = v_first.to(x.dtype).view(1, 1, -1)
            else:  # called as a module
                y = stream.to(x.dtype).view(1, 1, -1)
                y, state, made = self.blocks[start](y, states[start], first, None, True)
                if first is None and made is not None:
                    first, v_first = made, made.float().flatten()
                stream, stop = y.float().flatten(), start + 1
                new.append(state)
            start = stop
        return stream.to(x.dtype).view(1, 1, -1), tuple(new)

    def _run(
        self,
        run: range,
        stream: Tensor,
        v_first: Tensor,
        states: tuple[Any, ...],
        tokens: list[TokenState | None],
    ) -> list[Any]:
        """Consecutive blocks in one call, which changes `stream`; their new states."""
        here = [token for token in tokens[run.start : run.stop] if token is not None]
        before = [
            (state.ffn_shift if token.shift is None else token.shift, state.ffn_shift)
            for token, state in zip(here, states[run.start : run.stop], strict=True)
        ]
        first = sum(weights is not None for weights in self.weights[: run.start])
        matrices = [token.matrix for token in here]
        made = [None if x is None else torch.empty_like(x) for x in matrices]
        shifts, caches = torch.empty(len(here), 2, self.width), [token.cache for token in here]
        assert self.compiled is not None
        places = range(first, first + len(here))
        self.compiled.read(places, stream, v_first, before, matrices, caches, shifts, made)
        narrow = shifts.to(states[run.start].ffn_shift.dtype).unsqueeze(2)
        return [token.after(narrow[i, 0], made[i], narrow[i, 1]) for i, token in enumerate(here)]


_forms: WeakKeyDictionary[Model, CompiledModel] = WeakKeyDictionary()


def form_of(model: Model) -> CompiledModel:
    """The compiled form of a model, made anew when anything that it read has changed."""
    form = _forms.get(model)
    if form is None or not form.watch.holds():
        form = _forms[model] = CompiledModel(model)
    return form


class Watch:
    """What was true of some modules: where tensors lie, children, plain attributes, no hooks.

    plain: for each list of modules, whether compiled code may stand in for all of them.
    """

    def __init__(self, lists: list[list[nn.Module]]) -> None:
        modules = list(chain.from_iterable(lists))
        tables = [t for m in modules for t in (m._parameters, m._buffers, m._modules)]
        self._tables: list[dict[str, Any]] = [table for table in tables if table]
        self._objects = self._look_objects()
        self._tensors = [x for x in self._objects if isinstance(x, Tensor)]
        self._places = self._look_places()
        self._getters = _attribute_getters(modules)
        self._attributes = self._look_attributes()
        self._hooks = [h for m in modules for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._own = [vars(m) for m in modules]
        self._were_hooked = self._look_hooks()
        self.plain = [all(type(m) in PLAIN and not _is_hooked(m) for m in each) for each in lists]

    def holds(self) -> bool:
        """Whether it still is. Asked for every token, hence no loop of Python over weights."""
        objects = self._look_objects()
        return (
            len(objects) == len(self._objects)
            and all(map(is_, objects, self._objects))
            and self._look_places() == self._places
            and self._look_attributes() == self._attributes
            and self._look_hooks() == self._were_hooked
        )

    def _look_objects(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self._tables)))

    def _look_places(self) -> list[int]:
        return list(map(Tensor.data_ptr, self._tensors))

    def _look_attributes(self) -> list[list[Any]]:
        return [list(map(getter, modules)) for getter, modules in self._getters]

    def _look_hooks(self) -> list[bool]:
        return [*map(bool, self._hooks), *("forward" in own for own in self._own)]


class _Getter(NamedTuple):
    read: Callable[[Any], Any]
    modules: list[nn.Module]


def _attribute_getters(modules: list[nn.Module]) -> list[_Getter]:
    """Readers of all plain attributes, one for all modules that have the same ones."""
    by_names: dict[tuple[str, ...], list[nn.Module]] = {}
    for module in modules:
        names = tuple(n for n in vars(module) if not n.startswith("_") and n != "training")
        by_names.setdefault(names, []).append(module)
    return [_Getter(attrgetter(*names), group) for names, group in by_names.items() if names]


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _weights(block: Block, dtype: torch.dtype) -> BlockWeights | None:
    """None for a block that compiled code does not have."""
    ffn = block.ffn
    products = [getattr(block.att, n, None) for n in ("receptance", "key", "value", "output")]
    common = BlockWeights(
        heads=0,
        ln1=(block.ln1.weight, block.ln1.bias),
        ln2=(block.ln2.weight, block.ln2.bias),
        eps=(block.ln1.eps, block.ln2.eps, 0.0),
        channel=(ffn.x_k, ffn.key.weight, ffn.value.weight),
        channel_scales=(ffn.key.scale, ffn.value.scale),
        matrices=tuple(None if m is None else m.weight for m in products),
        scales=tuple(None if m is None else m.scale for m in products),
    )
    weights = block.att.token_weights(common)
    return weights if weights is not None and weights.fit(dtype) else None


def _is_plain(state: Any, dtype: torch.dtype) -> bool:
    return state.ffn_shift.dtype == dtype and state.ffn_shift.is_contiguous()
