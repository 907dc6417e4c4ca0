"""What is trained beside a model: low-rank updates of its matrices, or the state it starts from.

The model stays as it is; the folder of an adapter names it by its fingerprint.
Axes: B rows, H heads, N head size, R rank.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rwkvx.checkpoint.safetensors import write_tensors
from rwkvx.checkpoint.shards import read_file
from rwkvx.errors import InputError
from rwkvx.files import read_json, replacing_folder, write_json
from rwkvx.kinds.rwkv7 import Rwkv7State
from rwkvx.model import Model
from rwkvx.ranges import Number, OneOf, Whole, check_ranges
from rwkvx.settings import from_plain
from rwkvx.state import ModelState

__all__ = ["AdapterConfig", "add_adapter", "apply_adapter", "base_tensors", "starting_state"]

TENSORS, ABOUT = "adapter.safetensors", "adapter.json"
_UPDATE, _ORIGINAL = ".parametrizations.weight.0.", ".parametrizations.weight.original"
STATES = "starting_states"  # the model's attribute, and the names of its parameters begin with it


@dataclass(frozen=True)
class AdapterConfig:
    """Which adapter.

    Attributes:
        kind: "lora" (arXiv 2106.09685), "state" (a learned initial state of RWKV-7 blocks), "" for
            none: the model itself is trained.
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


class LowRankUpdate(nn.Module):
    """W + alpha / R · up down, with `up` zero at first: the model starts as it is."""

    def __init__(self, weight: Tensor, config: AdapterConfig, generator: torch.Generator) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        down = torch.empty(config.rank, inputs)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        self.down = nn.Parameter(down.to(weight))
        self.up = nn.Parameter(weight.new_zeros(outputs, config.rank))
        self.scale = config.alpha / config.rank

    def forward(self, weight: Tensor) -> Tensor:
        """The updated weight."""
        return weight + self.scale * (self.up @ self.down)


class StartingStates(nn.ParameterDict):
    """[H, N, N] for each RWKV-7 block by its number, zero at first."""

    def __init__(self, model: Model) -> None:
        blocks = enumerate(model.fresh_state(1).blocks)
        states = ((str(i), x.wkv[0]) for i, x in blocks if isinstance(x, Rwkv7State))
        super().__init__({i: nn.Parameter(x.clone()) for i, x in states})


def add_adapter(model: Model, config: AdapterConfig, seed: int) -> None:
    """Freeze the model and put an adapter into it.

    Raises:
        InputError: the model has nothing that it could be put to.
    """
    model.requires_grad_(False)
    if config.kind == "state":
        if "rwkv7" not in model.config.pattern:
            raise InputError("adapter state: the model has no RWKV-7 block, which starts from one")
        model.add_module(STATES, StartingStates(model))
        return
    generator, found = torch.Generator().manual_seed(seed), set()
    for name, module in list(model.blocks.named_modules()):
        matching = {x for x in config.targets if f".{name}".endswith(f".{x}")}
        if matching and isinstance(module, nn.Linear):
            update = LowRankUpdate(module.weight, config, generator)
            parametrize.register_parametrization(module, "weight", update)
            found |= matching
    if missing := sorted(set(config.targets) - found):
        raise InputError(f"adapter lora: no projection is called {missing[0]!r}")


def starting_state(model: Model, rows: int) -> ModelState | None:
    """The learned state for so many rows, as the model's own where there is none: None."""
    states = getattr(model, STATES, None)
    if states is None:
        return None
    blocks = []
    for i, block in enumerate(model.fresh_state(rows).blocks):
        if isinstance(block, Rwkv7State):
            block = block._replace(wkv=states[str(i)].expand_as(block.wkv))
        blocks.append(block)
    return ModelState(tuple(blocks), 0)


def adapter_tensors(model: Model) -> dict[str, Tensor]:
    """What was trained, by the names of the weights that it belongs to."""
    return {
        name.replace(_UPDATE, "."): x.detach()
        for name, x in model.named_parameters()
        if _UPDATE in name or name.startswith(STATES)
    }


def base_tensors(model: Model) -> dict[str, Tensor]:
    """The weights by their plain names, low-rank updates added, nothing else of an adapter."""
    found = {}
    for name, x in model.state_dict().items():
        if name.endswith(_ORIGINAL):
            name = name.removesuffix(_ORIGINAL)
            found[f"{name}.weight"] = cast(Tensor, model.get_submodule(name).weight).detach()
        elif _UPDATE not in name and not name.startswith(STATES):
            found[name] = x
    return found


def write_adapter(model: Model, config: AdapterConfig, base: str, folder: Path) -> None:
    """Write an adapter; `base`: fingerprint of the model before it."""
    with replacing_folder(folder) as temporary:
        write_tensors(temporary / TENSORS, adapter_tensors(model))
        about = {**asdict(config), "targets": list(config.targets)}
        write_json(temporary / ABOUT, {"base": base, "adapter": about})


def apply_adapter(model: Model, folder: Path) -> None:
    """Add an adapter to its base model: updates into the weights, or a starting state beside them.

    Raises:
        InputError: no adapter, damage, or the adapter of another model.
    """
    about = read_json(folder / ABOUT)
    if not isinstance(about, dict) or not isinstance(about.get("adapter"), dict):
        raise InputError(f"{folder / ABOUT} is damaged: it describes no adapter")
    if about.get("base") != model.fingerprint():
        raise InputError(f"{folder} is an adapter of another model than the one that is loaded")
    config = from_plain(AdapterConfig, about["adapter"], str(folder / ABOUT))
    add_adapter(model, config, 0)
    tensors: dict[str, Any] = read_file(folder / TENSORS)
    own = adapter_tensors(model)
    if set(own) != set(tensors) or any(own[n].shape != x.shape for n, x in tensors.items()):
        raise InputError(f"{folder / TENSORS} does not fit what {ABOUT} describes")
    for name, x in tensors.items():
        own[name].copy_(x)
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    model.requires_grad_(True)
