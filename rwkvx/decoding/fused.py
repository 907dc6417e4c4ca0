"""Decoding on a GPU: each block in a few launches (kernels/one_token), modules where that is not.

Axes: B batch rows, C width, V vocabulary.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rwkvx.decoding.watch import Watch, weights_of
from rwkvx.layers import Linear, norm_of
from rwkvx.model import Block, Model
from rwkvx_kernels.dispatch import facts_of
from rwkvx_kernels.one_token import BlockWeights, Memory, embed, logits, read_block
from rwkvx_kernels.one_token.api import choose


class FusedModel:
    """A model as the kernels of one token see it, as long as `watch.holds()`.

    weights: of each block; None for a block that is called as a module.
    """

    def __init__(self, model: Model) -> None:
        self.blocks = list(model.blocks)
        self._emb, self._ln0, self._ln_out, self._head = _ends(model)
        lists = [list(block.modules()) for block in self.blocks]
        lists += [[self._emb, self._ln0], [self._ln_out, self._head]]
        self.watch = Watch(model, lists)
        *plain, start, end = self.watch.plain
        like = model.emb.weight.detach()
        self.weights = [
            _weights(block, like) if fits else None
            for block, fits in zip(self.blocks, plain, strict=True)
        ]
        some = any(self.weights)
        self._embeds = some and start and _alike(like, self._emb.weight, *norm_of(self._ln0)[:2])
        head = [] if self._head.scale is not None else [self._head.weight]
        self._heads = some and end and _alike(like, *head, *norm_of(self._ln_out)[:2])

    def step(self, ids: Tensor, states: tuple[Any, ...]) -> tuple[Tensor, tuple[Any, ...]]:
        """ids [B, 1] -> logits [B, 1, V] and new states; those of fused blocks change in place."""
        dtype = self._emb.weight.dtype
        if self._embeds:
            x = embed(ids.flatten(), self._emb.weight, norm_of(self._ln0))
        else:
            x = self._ln0(self._emb(ids)).squeeze(1).float()
        v_first = torch.empty_like(x)
        first: Tensor | None = None  # v_first, once it is there
        new = []
        for block, weights, state in zip(self.blocks, self.weights, states, strict=True):
            if weights is not None:
                read_block(x, v_first, weights, _memory(block, state))
                if weights.mixes[0] is not None:
                    first = v_first
                new.append(state)
                continue
            given = None if first is None else first.to(dtype).unsqueeze(1)
            y, state, made = block(x.to(dtype).unsqueeze(1), state, given, None, True)
            x = y.squeeze(1).float()
            if first is None and made is not None:
                first = v_first = made.squeeze(1).float()
            new.append(state)
        if not self._heads:
            return self._head(self._ln_out(x.to(dtype))).unsqueeze(1), tuple(new)
        head = (self._head.weight, self._head.scale)
        return logits(x, norm_of(self._ln_out), *head, dtype).unsqueeze(1), tuple(new)


_forms: WeakKeyDictionary[Model, FusedModel] = WeakKeyDictionary()


def form_of(model: Model) -> FusedModel:
    """The fused form of a model, made anew when anything that it read has changed."""
    form = _forms.get(model)
    if form is None or not form.watch.holds():
        form = _forms[model] = FusedModel(model)
    return form


def _ends(model: Model) -> tuple[nn.Embedding, nn.LayerNorm, nn.LayerNorm, Linear]:
    return model.emb, model.ln0, model.ln_out, model.head


def _alike(like: Tensor, *tensors: Tensor | None) -> bool:
    """Whether all are there, and kernels may read them beside one another."""
    return all(
        x is not None and x.dtype == like.dtype and x.device == like.device and x.is_contiguous()
        for x in tensors
    )


def _weights(block: Block, like: Tensor) -> BlockWeights | None:
    """None for a block that the kernels do not have."""
    weights = weights_of(block, like)
    if weights is None:
        return None
    triton = choose(facts_of(like), head_size=weights.size, impl=block.att.impl).impl == "triton"
    return weights if triton else None


def _memory(block: Block, state: Any) -> Memory:
    token = block.att.token_state(state)
    assert token is not None  # it is the decoder's own
    return Memory(token.shift, token.matrix, state.ffn_shift, token.cache)
