"""Decoding on a CPU: runs of blocks in one compiled call (kernels/one_token).

A decoded token is bound by reading the weights; called one by one, the operations of a block cost
as much again. Axes: C width, L blocks, H heads, N head size.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rwkvx.decoding.watch import Watch, weights_of
from rwkvx.kinds.contract import TokenState
from rwkvx.model import Model
from rwkvx.state import ModelState
from rwkvx_kernels.dispatch import facts_of
from rwkvx_kernels.one_token import OneToken
from rwkvx_kernels.one_token.api import choose


def can_compile(model: Model, rows: int) -> str | None:
    """Why compiled code cannot decode so many rows of a model; None if it can."""
    found = _form_for(model, rows)
    return found if isinstance(found, str) else None


def _form_for(model: Model, rows: int) -> "CompiledModel | str":
    """The model's compiled form, or why compiled code cannot decode so many rows of it."""
    choice = choose(facts_of(model.emb.weight.detach()), rows)
    if choice.impl != "compiled":
        return choice.why
    form = form_of(model)
    return form if any(form.weights) else "compiled code has none of these blocks"


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
        form = _form_for(model, ids.numel())
        if model.recurrent_pieces != 1 or isinstance(form, str):  # was changed meanwhile
            logits, self.state = model(ids, self.state, logits="last")
            assert logits is not None
            return logits
        model.check_ids(ids)
        x, blocks = form.read(model.ln0(model.emb(ids)), self.state.blocks)
        self.state = ModelState(blocks, self.state.length + 1)
        return model.head(model.ln_out(x))


class CompiledModel:
    """A model's blocks as compiled code sees them, as long as `watch.holds()`.

    weights: of each block; None for a block that is called as a module.
    """

    def __init__(self, model: Model) -> None:
        blocks = list(model.blocks)
        self.blocks, self.width = blocks, model.config.width
        self.watch = Watch(model, [list(block.modules()) for block in blocks])
        found = [
            weights_of(block, model.emb.weight) if plain else None
            for block, plain in zip(blocks, self.watch.plain, strict=True)
        ]
        self.weights = found
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


def _is_plain(state: Any, dtype: torch.dtype) -> bool:
    return state.ffn_shift.dtype == dtype and state.ffn_shift.is_contiguous()
