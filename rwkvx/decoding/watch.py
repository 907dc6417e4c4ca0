"""What decoders that know a model's blocks have read of them, and whether it still holds.

They take addresses of weights and plain numbers; whoever changes a model does not tell them.
"""

from collections.abc import Callable
from itertools import chain
from operator import attrgetter, is_
from typing import Any, NamedTuple

from torch import Tensor, nn

from rwkvx.kinds import KINDS
from rwkvx.layers import ChannelMix, Linear, is_hooked
from rwkvx.model import Block, Model
from rwkvx_kernels.one_token import BlockWeights

# Modules whose forward kernels of whole blocks do; anything else (an adapter's) is called.
PLAIN = {Block, Linear, ChannelMix, nn.LayerNorm, nn.GroupNorm, nn.Embedding, *KINDS.values()}


class Watch:
    """What was true of a model, and of some of its modules: which there are, where tensors lie,
    plain attributes, no hooks. The model itself is not held.

    plain: for each list of modules, whether kernels may stand in for all of them.
    """

    def __init__(self, model: Model, lists: list[list[nn.Module]]) -> None:
        modules = list(chain.from_iterable(lists))
        every = [t for m in modules for t in (m._parameters, m._buffers, m._modules)]
        tables: list[dict[str, Any]] = [*every, model._modules, model.blocks._modules]
        self._tables = [table for table in tables if table]
        self._objects = self._look_objects()
        self._tensors = [x for x in self._objects if isinstance(x, Tensor)]
        self._places = self._look_places()
        self._getters = _attribute_getters(modules)
        self._attributes = self._look_attributes()
        self._hooks = [h for m in modules for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._own = [vars(m) for m in modules]
        self._were_hooked = self._look_hooks()
        self.plain = [all(type(m) in PLAIN and not is_hooked(m) for m in each) for each in lists]

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


def weights_of(block: Block, like: Tensor) -> BlockWeights | None:
    """Of a plain block, of dtype and device of `like`; None for one that kernels do not have."""
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
    return weights if weights is not None and weights.fit(like) else None
