"""RWKV-7 blocks (arXiv 2503.14456; BlinkDL/RWKV-LM, RWKV-v7/train_temp).

Axes: B batch, T time, C width, H heads, N head size, D low rank.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from rwkvx.kinds.contract import (
    Memory,
    Mixer,
    Shape,
    ShapeOf,
    TokenState,
    orthogonal,
    positions,
)
from rwkvx.layers import PRODUCTS, Linear, shifted
from rwkvx_kernels.dispatch import Choice, Facts
from rwkvx_kernels.linear import low_rank
from rwkvx_kernels.linear.api import choose as choose_linear
from rwkvx_kernels.one_token import BlockWeights
from rwkvx_kernels.time_mix import TimeMixWeights, time_mix, time_mix_summary
from rwkvx_kernels.time_mix.api import choose as choose_time_mix
from rwkvx_kernels.token_shift import Norm

if TYPE_CHECKING:
    from rwkvx.config import ModelConfig

MIXES = ("r", "w", "k", "v", "a", "g")
# Power p of 1 - (c/C)^(p·(1 - l/L)) for each token-shift mix.
SHIFT_POWER = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}


class Rwkv7State(NamedTuple):
    """Of constant size.

    `shift` and `ffn_shift` [B, C] are the last inputs of the two mixers, `wkv` [B, H, N, N]
    (value, key) the float32 matrix state.
    """

    shift: Tensor
    wkv: Tensor
    ffn_shift: Tensor

    def map(self, f: Callable[[Tensor], Tensor]) -> "Rwkv7State":
        """With `f` applied to every tensor."""
        return Rwkv7State(*map(f, self))

    def recurrent(self) -> "Rwkv7State":
        """Detached."""
        return self.map(Tensor.detach)

    def select(self, index: Tensor) -> "Rwkv7State":
        """The rows `index`."""
        return self.map(lambda x: x[index])

    def bytes(self) -> int:
        """Memory."""
        return sum(x.nbytes for x in self)


class TimeMix(Mixer):
    """r, w, k, v, a, g from the token-shifted input, the WKV7 recurrence, group norm and gate."""

    State = Rwkv7State
    recurrent = True
    shifts = True
    fields = frozenset(("decay_rank", "iclr_rank", "value_rank", "gate_rank", "group_norm_eps"))
    prefixes = {  # noqa: RUF012 (of the class by its contract)
        "blinkdl": "blocks.",
        "rwkv-x": "rwkv.blocks.",
        "fla": "model.layers.",
        "ggml": "blocks.",
    }

    x_r: nn.Parameter
    w0: nn.Parameter
    w1: nn.Parameter
    w2: nn.Parameter
    a0: nn.Parameter
    a1: nn.Parameter
    a2: nn.Parameter
    v0: nn.Parameter
    v1: nn.Parameter
    v2: nn.Parameter
    g1: nn.Parameter
    g2: nn.Parameter
    receptance: Linear
    key: Linear
    value: Linear
    output: Linear

    def __init__(self, config: "ModelConfig", position: int) -> None:
        super().__init__(config, position)
        width = config.width
        own = positions(config.pattern, config.pattern[position])
        self.index, self.count = own.index(position), len(own)
        for name in MIXES:
            self.register_parameter(f"x_{name}", nn.Parameter(torch.empty(width)))
        for name, rank in config.ranks.items():
            if name == "v" and self.index == 0:  # it makes v_first and needs no value residual
                continue
            if name != "g":
                self.register_parameter(f"{name}0", nn.Parameter(torch.empty(width)))
            self.register_parameter(f"{name}1", nn.Parameter(torch.empty(width, rank)))
            self.register_parameter(f"{name}2", nn.Parameter(torch.empty(rank, width)))
        self.k_k, self.k_a = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))
        self.r_k = nn.Parameter(torch.empty(config.heads, config.head_size))
        for name in ("receptance", "key", "value", "output"):
            self.add_module(name, Linear(width, width))
        self.ln_x = nn.GroupNorm(config.heads, width, eps=config.group_norm_eps)

    def forward(
        self,
        x: Tensor,
        state: Rwkv7State,
        v_first: Tensor | None,
        cu_seqlens: Tensor | None = None,
        keep_cache: bool = True,
        norm: Norm | None = None,
    ) -> tuple[Tensor, Rwkv7State, Tensor]:
        """See `Mixer.forward`."""
        mixes = [getattr(self, f"x_{name}") for name in MIXES]
        mixed, shift = shifted(self, x, state.shift, mixes, cu_seqlens, norm)
        x_r, x_w, x_k, x_v, x_a, x_g = mixed
        r, k, v = self.receptance(x_r), self.key(x_k), self.value(x_v)
        impl = PRODUCTS.get(self.impl, self.impl)
        w = low_rank(x_w, self.w1, self.w2, "tanh", impl)
        a = low_rank(x_a, self.a1, self.a2, impl=impl)
        g = low_rank(x_g, self.g1, self.g2, "sigmoid", impl)
        residual, v0 = None, None
        if v_first is not None:
            residual, v0 = (low_rank(x_v, self.v1, self.v2, impl=impl), v_first), self.v0
        vectors = (self.k_k, self.k_a, self.r_k, self.ln_x.weight, self.ln_x.bias)
        weights, matrix = TimeMixWeights(self.w0, self.a0, v0, *vectors), state.wkv
        if self.sequence is not None:
            summary = time_mix_summary(r, w, k, v, a, residual, weights, self.impl)
            matrix = self.sequence.state_before(*summary, matrix)
        tokens = (r, w, k, v, a, g)
        y, wkv = time_mix(*tokens, residual, weights, self.ln_x.eps, matrix, cu_seqlens, self.impl)
        v_first = v if v_first is None else v_first
        return self.output(y), Rwkv7State(shift, wkv, state.ffn_shift), v_first

    def state_shapes(self) -> dict[str, Shape | None]:
        """See `Rwkv7State`."""
        width, heads, size = self.config.width, self.config.heads, self.config.head_size
        return {"shift": (width,), "wkv": (heads, size, size), "ffn_shift": (width,)}

    @staticmethod
    def dtype(name: str, like: Tensor) -> torch.dtype:
        """The matrix state is float32 (float64 beside float64)."""
        return torch.promote_types(like.dtype, torch.float32) if name == "wkv" else like.dtype

    @property
    def height(self) -> float:
        """Counted among the blocks of this kind alone."""
        return 1 - self.index / self.count

    def init_weights(self, generator: torch.Generator) -> None:
        """BlinkDL/RWKV-LM, RWKV-v7/train_temp/src/model.py; l = index, L = count."""
        width, size = self.config.width, self.config.head_size
        channel = torch.arange(width, dtype=torch.float32)
        linear = channel / max(width - 1, 1) - 0.5
        half = (size - 1) / 2
        z = (channel % size - half) / max(half, 0.5)
        zigzag = z * z.abs()
        for name, power in SHIFT_POWER.items():
            mix = getattr(self, f"x_{name}")
            mix.copy_(1 - (channel / width) ** (power * self.height))
        to_one = self.index / max(self.count - 1, 1)
        speed = -6 + 6 * (channel / max(width - 1, 1)) ** (1 + to_one**0.3)
        self.w0.copy_(speed + 0.5 + 2.5 * zigzag)
        self.a0.copy_(-0.19 + 0.3 * zigzag + 0.4 * linear)
        low_ranks = "wavg" if self.index else "wag"
        if self.index:
            self.v0.copy_(0.73 - 0.4 * linear)
        self.k_k.copy_(0.71 - 0.1 * linear)
        nn.init.constant_(self.k_a, 1.02)
        nn.init.constant_(self.r_k, -0.04)
        for name in low_ranks:
            nn.init.zeros_(getattr(self, f"{name}1"))
            up = getattr(self, f"{name}2")
            rows, columns = up.shape
            gain = 0.1 * math.sqrt(rows / columns) if rows > columns else 0.1
            orthogonal(up, gain, generator)
        orthogonal(self.receptance.weight, 1.0, generator)
        orthogonal(self.key.weight, 0.1, generator)
        orthogonal(self.value.weight, 1.0, generator)
        nn.init.zeros_(self.output.weight)
        nn.init.constant_(self.ln_x.weight, ((self.index + 1) / self.count) ** 0.7)
        nn.init.zeros_(self.ln_x.bias)

    def token_weights(self, common: BlockWeights) -> BlockWeights | None:
        """All of them."""
        own = self._parameters
        return common._replace(
            mixes=tuple(own[f"x_{name}"] for name in MIXES),
            down=tuple(own.get(f"{name}1") for name in "wavg"),
            up=tuple(own.get(f"{name}2") for name in "wavg"),
            vectors=(
                *(own.get(name) for name in ("w0", "a0", "v0", "k_k", "k_a", "r_k")),
                self.ln_x.weight,
                self.ln_x.bias,
            ),
            heads=len(self.r_k),
            eps=(*common.eps[:2], self.ln_x.eps),
        )

    def token_state(self, state: Rwkv7State, keep_cache: bool = True) -> TokenState | None:
        """See `Mixer.token_state`."""
        if not all(x.is_contiguous() for x in state) or state.wkv.dtype != torch.float32:
            return None

        def after(shift: Tensor, matrix: Tensor | None, ffn_shift: Tensor) -> Rwkv7State:
            assert matrix is not None
            return Rwkv7State(shift, matrix, ffn_shift)

        return TokenState(state.shift, state.wkv, None, after)

    def decodes_in_place(self, like: Tensor) -> bool:
        """With the Triton kernels."""
        facts = Facts(like.device, like.dtype)
        return choose_time_mix(facts, self.config.head_size, self.impl).impl == "triton"

    def route(self, facts: Facts, rows: int, tokens: int) -> dict[str, Choice]:
        """See `Mixer.route`."""
        products = choose_linear(facts, rows, PRODUCTS.get(self.impl, self.impl))
        recurrence = choose_time_mix(facts, self.config.head_size, self.impl)
        return {"low-rank products": products, "decay, recurrence, norm and gate": recurrence}

    @classmethod
    def used(cls, config: "ModelConfig") -> frozenset[str]:
        """The first block has no value residual."""
        return cls.fields - {"value_rank"} if config.pattern.count("rwkv7") < 2 else cls.fields

    @classmethod
    def describe(cls, config: "ModelConfig") -> str:
        """Low ranks."""
        return "low ranks " + ", ".join(f"{name} {rank}" for name, rank in config.ranks.items())

    @classmethod
    def memory(cls, config: "ModelConfig", element: int) -> Memory:
        """Constant; the matrix state is float32 always."""
        return Memory(2 * config.width * element + config.heads * config.head_size**2 * 4)

    @classmethod
    def decode_bytes(cls, config: "ModelConfig", tokens: int, element: int) -> int:
        """The matrix state out and in."""
        return 2 * 4 * config.width * config.head_size

    @classmethod
    def flops(cls, config: "ModelConfig", start: int, stop: int) -> dict[str, int]:
        """The recurrence as it is written: 9 K V a token and head (kernels/wkv7/README.md)."""
        return {"recurrence": 9 * config.width * config.head_size * (stop - start)}

    @classmethod
    def sizes(cls, shape: ShapeOf) -> dict[str, Any]:
        """Head size and low ranks; the first block has no value residual."""
        ranks = {"decay_rank": "w1", "iclr_rank": "a1", "gate_rank": "g1"}
        found = {field: _second(shape(f"att.{name}", 0)) for field, name in ranks.items()}
        value = _second(shape("att.v1", 1))
        return {"head_size": _second(shape("att.r_k", 0)), "value_rank": value, **found}


def _second(shape: Shape | None) -> int | None:
    return None if shape is None else shape[1]
