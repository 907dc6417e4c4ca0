"""Adapters: what is trained beside a model that stays as it is.

Low-rank updates beside its projections, or the state that sequences start from. Their files are
read and written by `rwkvx.checkpoint.adapter`.
Axes: B rows, H heads, N head size, R rank.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rwkvx.errors import InputError
from rwkvx.model import Model
from rwkvx.ranges import Number, OneOf, Whole, check_ranges

__all__ = ["AdapterConfig", "adapter_tensors", "add_adapter", "set_starting_state", "updated"]

UPDATE = ".parametrizations.weight.0."  # in the names of an update's parameters
START = ".att.start."


@dataclass(frozen=True)
class AdapterConfig:
    """An adapter.

    Attributes:
        kind: "lora" (arXiv 2106.09685), "state" (a learned initial state of the recurrent blocks),
            "" for none: the model itself is trained.
        rank, alpha: of LoRA: an update is alpha / rank times a product of two matrices.
        targets: of LoRA: the projections of every block that are updated, by the ends of their
            names: "value", or "att.value" for that of the mixer alone.
    """

    kind: Annotated[str, OneOf("", "lora", "state")] = ""
    rank: Annotated[int, Whole(1, 4096)] = 8
    alpha: Annotated[float, Number(0, 1e6, above=True)] = 16.0
    targets: tuple[str, ...] = ("receptance", "key", "value", "output")

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.kind == "lora" and not self.targets:
            raise InputError("targets must name at least one projection")

    @property
    def scale(self) -> float:
        """What the product of the two matrices is multiplied with."""
        return self.alpha / self.rank


class LowRankUpdate(nn.Module):
    """W + alpha / R · up down, with `up` zero at first: the model starts as it is."""

    def __init__(self, weight: Tensor, config: AdapterConfig, generator: torch.Generator) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        down = torch.empty(config.rank, inputs)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        self.down = nn.Parameter(down.to(weight))
        self.up = nn.Parameter(weight.new_zeros(outputs, config.rank))
        self.scale = config.scale

    def forward(self, weight: Tensor) -> Tensor:
        """The updated weight."""
        return updated(weight, self.up, self.down, self.scale)


def updated(weight: Tensor, up: Tensor, down: Tensor, scale: float) -> Tensor:
    """W + scale · up down."""
    return weight + scale * (up @ down)


def add_adapter(model: Model, config: AdapterConfig, seed: int) -> None:
    """Freeze the model and put an adapter into it that changes nothing yet.

    Raises:
        InputError: the model has nothing that it could be put to.
    """
    model.requires_grad_(False)
    if config.kind == "state":
        matrices = _starting_matrices(model)
        if not matrices:
            raise InputError("adapter state: the model has no recurrent block to start from one")
        set_starting_state(model, {n: torch.zeros_like(x) for n, x in matrices.items()})
        return
    generator, found = torch.Generator().manual_seed(seed), set[str]()
    for name, module in list(model.blocks.named_modules()):
        matching = {x for x in config.targets if f".{name}".endswith(f".{x}")}
        if matching and isinstance(module, nn.Linear):
            update = LowRankUpdate(module.weight, config, generator)
            parametrize.register_parametrization(module, "weight", update)
            found |= matching
    if missing := sorted(set(config.targets) - found):
        raise InputError(f"adapter lora: no projection is called {missing[0]!r}")


def set_starting_state(model: Model, tensors: Mapping[str, Tensor]) -> None:
    """Let sequences start from a state; names as of `adapter_tensors`.

    Raises:
        InputError: it is not one of this model's.
    """
    own = _starting_matrices(model)
    if {n: x.shape for n, x in own.items()} != {n: x.shape for n, x in tensors.items()}:
        raise InputError("the starting state does not fit the model")
    for number, block in enumerate(model.blocks):
        prefix = f"blocks.{number}{START}"
        found = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
        if found:
            like = {n: own[prefix + n] for n in found}
            values = {n: nn.Parameter(x.to(like[n])) for n, x in found.items()}
            block.att.start = nn.ParameterDict(values)


def _starting_matrices(model: Model) -> dict[str, Tensor]:
    """The matrix states of recurrent blocks before the first token: [H, N, N] in RWKV-7."""
    found: dict[str, Tensor] = {}
    for number, block in enumerate(model.blocks):
        if block.att.recurrent:
            fresh = block.att.fresh_state(1, model.emb.weight)
            shapes = block.att.state_shapes()
            names = [name for name, shape in shapes.items() if shape and len(shape) > 1]
            found |= {f"blocks.{number}{START}{n}": getattr(fresh, n)[0] for n in names}
    return found


def adapter_tensors(model: Model) -> dict[str, Tensor]:
    """What was trained, by the names of the modules that it belongs to."""
    return {
        name.replace(UPDATE, "."): x.detach()
        for name, x in model.named_parameters()
        if UPDATE in name or START in name
    }
