"""What a kind of block is: everything that the package asks of one.

A kind is one file of this folder: a mixer (the half of a residual block that mixes over time) and
its state. `KINDS` (in `__init__.py`) names them all; nothing else knows which kinds there are.
Axes: B batch rows, T time, C width.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from rwkvx.errors import InputError
from rwkvx.ranges import Whole
from rwkvx.sequence import SequenceParallel
from rwkvx_kernels.chunk_attention import KeyValueCache
from rwkvx_kernels.dispatch import Choice, Facts
from rwkvx_kernels.one_token import BlockWeights, Cache

if TYPE_CHECKING:
    from rwkvx.config import ModelConfig

Shape = tuple[int, ...]
# Shape of a parameter of the n-th block of a kind, by its name in the block; None if there is none.
ShapeOf = Callable[[str, int], Shape | None]


class Option(NamedTuple):
    """A field of the config that one kind brings."""

    default: int
    range: Whole
    about: str


class Memory(NamedTuple):
    """Bytes of one sequence's state: what it always takes, and what each token read adds.

    `most` is the largest number of tokens that add something; None: all.
    """

    constant: int
    per_token: float = 0.0
    most: int | None = None

    def at(self, tokens: int) -> float:
        """After so many tokens."""
        counted = tokens if self.most is None else min(tokens, self.most)
        return self.constant + self.per_token * counted


class BlockState(Protocol):
    """What a block remembers: a NamedTuple of tensors whose first axis is rows, None for what a
    config leaves out, and caches of keys and values (rwkvx/cache.py).

    `ffn_shift` [B, C], the last field, is the last input of the channel mix. The tensors are what
    state passing saves; states are never changed, only replaced.
    """

    @property
    def ffn_shift(self) -> Tensor: ...

    def map(self, f: Callable[[Tensor], Tensor]) -> Self:
        """With `f` applied to every tensor; caches are kept as they are."""
        ...

    def recurrent(self) -> Self:
        """Detached and without caches: what state passing passes on."""
        ...

    def select(self, index: Tensor) -> Self:
        """The rows `index`; of caches, copies or shares, whichever costs less."""
        ...

    def bytes(self) -> int:
        """Memory that the tokens read take; spare capacity of caches is not counted."""
        ...

    def _asdict(self) -> dict[str, Any]: ...

    def _replace(self, **fields: Any) -> Self: ...


class TokenState(NamedTuple):
    """A block's state as compiled code reads and writes it for one token (kernels/one_token).

    Attributes:
        shift: [1, C] last input of the mixer, for a kind that has one.
        matrix: [1, H, N, N] float32 state of WKV7, for a kind that has one.
        cache: place of the new token's key and value, for a kind that attends.
        after: makes the new state of the new shift, matrix state and shift of the channel mix.
    """

    shift: Tensor | None
    matrix: Tensor | None
    cache: Cache | None
    after: Callable[[Tensor, Tensor | None, Tensor], Any]


class Mixer(nn.Module):
    """y = mixer(ln1(x)) of a residual block, and all that its kind decides.

    Attributes:
        State: the NamedTuple that fits `BlockState`.
        fields: those of `ModelConfig` that this kind reads, and not every kind.
        options: fields of the config that this kind brings beside those.
        prefixes: where foreign layouts of files keep the blocks of this kind: what stands before a
            block's number. A layout that is not named has no place for the kind.
        recurrent: whether the memory is of constant size, so that training may cut a sequence into
            pieces that start from states of their own.
        shifts: whether the mixer begins with a token shift. Its `forward` then has a last argument
            `norm`, given where one kernel does both: the layer norm that x has still to go through.
    """

    State: ClassVar[Any]
    fields: ClassVar[frozenset[str]] = frozenset()
    options: ClassVar[Mapping[str, Option]] = {}
    prefixes: ClassVar[Mapping[str, str]] = {}
    recurrent: ClassVar[bool] = False
    shifts: ClassVar[bool] = False

    def __init__(self, config: "ModelConfig", position: int) -> None:
        """position: of the block in the model, from 0."""
        super().__init__()
        self.config, self.position = config, position
        self.impl = "auto"
        # Tensors of the state that a sequence starts from in place of zeros, without the row axis
        # (rwkvx/adapters): a mapping, or an nn.ParameterDict.
        self.start: Any = {}
        self.sequence: SequenceParallel | None = None  # who reads the other parts of a sequence

    def forward(
        self,
        x: Tensor,
        state: Any,
        v_first: Tensor | None,
        cu_seqlens: Tensor | None = None,
        keep_cache: bool = True,
    ) -> tuple[Tensor, Any, Tensor | None]:
        """Mix over time.

        Args:
            x: [B, T, C], normalised. state: the block's; its `ffn_shift` is not the mixer's.
            v_first: [B, T, C], the values of the first RWKV-7 block, which later ones use and all
                other kinds pass on; None before it.
            cu_seqlens: [sequences + 1] offsets of sequences packed along T, batch size 1; the state
                has one row per sequence.
            keep_cache: False keeps no new cache of keys and values.

        Returns:
            y [B, T, C], the state after the last token, v_first.
        """
        raise NotImplementedError

    def empty_cache(self, like: Tensor, rows: int, capacity: int = 0) -> KeyValueCache:
        """For the keys and values of a kind that keeps them (kinds/attention.py)."""
        raise NotImplementedError

    # The state

    def state_shapes(self) -> dict[str, Shape | None]:
        """Shape of one row of every tensor of the state; None for what this config leaves out."""
        raise NotImplementedError

    def fresh_state(self, rows: int, like: Tensor, capacity: int = 0) -> Any:
        """Before the first token, with room for `capacity` tokens, on the device of `like`."""
        made: dict[str, Tensor | None] = {}
        for name, shape in self.state_shapes().items():
            dtype = self.dtype(name, like)
            if shape is None:
                made[name] = None
            elif name in self.start:
                made[name] = self.start[name].to(dtype).repeat(rows, *[1] * len(shape))
            else:
                made[name] = like.new_zeros(rows, *shape, dtype=dtype)
        return self.State(**made)

    @staticmethod
    def dtype(name: str, like: Tensor) -> torch.dtype:
        """Of a tensor of the state; matrix states are float32 beside narrower weights."""
        return like.dtype

    def check_state(self, state: Any, rows: int, like: Tensor) -> None:
        """Refuse a state that is not one of this block's: it would be read as something else.

        Raises:
            InputError: another kind, other sizes, another number of rows, another device.
        """
        if type(state) is not self.State:
            raise InputError(
                f"block {self.position} takes a {self.State.__name__}, not a {type(state).__name__}"
            )
        held = len(state.ffn_shift)
        if held != rows:
            raise InputError(f"the state is of {held} sequences, the model reads {rows}")
        for name, shape in self.state_shapes().items():
            x = getattr(state, name)
            found = None if x is None else tuple(x.shape)
            wanted = None if shape is None else (rows, *shape)
            if found != wanted:
                raise InputError(
                    f"the state of block {self.position} does not fit this model: {name} is "
                    f"{found and list(found)}, expected {wanted and list(wanted)}"
                )
            if x is not None and x.device != like.device:
                raise InputError(f"the state is on {x.device}, the model on {like.device}")

    # Initial weights

    @property
    def height(self) -> float:
        """1 for the first block, falling to 0 with depth: how initial weights change with it."""
        return 1 - self.position / len(self.config.pattern)

    def init_weights(self, generator: torch.Generator) -> None:
        """Fill every parameter with its initial value."""
        raise NotImplementedError

    # What compiled decoding reads (rwkvx/decoding/compiled.py)

    def token_weights(self, common: BlockWeights) -> BlockWeights | None:
        """The block's weights with the mixer's among them; None if compiled code has no such
        block."""
        return None

    def token_state(self, state: Any, keep_cache: bool = True) -> TokenState | None:
        """The state for one more token; None if compiled code cannot read this one."""
        return None

    def decodes_in_place(self, like: Tensor) -> bool:
        """Whether a decoded token is the same launches every time, so that a graph can hold it."""
        return False

    def between_tokens(self, state: Any, lengths: Sequence[int]) -> None:
        """What such a graph cannot hold, as it depends on the tokens that each row has by now:
        work on the state, in place, that waits for no device."""

    def route(self, facts: Facts, rows: int, tokens: int) -> dict[str, Choice]:
        """Which implementations the mixer's own operations run, by name.

        rows: rows of a product; tokens: of each sequence, in one call.
        """
        return {}

    # The config and the costs, before there is a mixer

    @classmethod
    def check_config(cls, config: "ModelConfig") -> None:
        """Raise InputError for a config that a block of this kind cannot be made of."""

    @classmethod
    def part_multiple(cls, config: "ModelConfig") -> int:
        """Of how many tokens the parts of a sequence that processes share must be a multiple."""
        return 1

    @classmethod
    def used(cls, config: "ModelConfig") -> frozenset[str]:
        """Those of `fields` and `options` that change something in this model."""
        return cls.fields | set(cls.options)

    @classmethod
    def describe(cls, config: "ModelConfig") -> str:
        """One line for people."""
        return ""

    @classmethod
    def memory(cls, config: "ModelConfig", element: int) -> Memory:
        """State of one sequence; `element`: bytes of a number of the model's dtype."""
        raise NotImplementedError

    @classmethod
    def decode_bytes(cls, config: "ModelConfig", tokens: int, element: int) -> int:
        """Of the state, read and written for one token after so many."""
        raise NotImplementedError

    @classmethod
    def flops(cls, config: "ModelConfig", start: int, stop: int) -> dict[str, int]:
        """Of tokens `start` ... `stop` - 1 of a sequence, forward, by what is done; without the
        products with weights. A multiplication and an addition are two."""
        raise NotImplementedError

    # Files

    @classmethod
    def sizes(cls, shape: ShapeOf) -> dict[str, Any]:
        """Fields of the config that the shapes of this kind's parameters tell."""
        return {}

    @classmethod
    def beyond_layouts(cls, config: "ModelConfig") -> str | None:
        """What of the config the published layouts of this kind have no place for, in words."""
        return None


def orthogonal(parameter: Tensor, gain: float, generator: torch.Generator) -> None:
    """Fill a matrix with an orthogonal one, drawn in float32 whatever its dtype is."""
    value = torch.empty(parameter.shape, dtype=torch.float32)
    parameter.copy_(nn.init.orthogonal_(value, gain=gain, generator=generator))


def tensors_of(state: BlockState) -> dict[str, Tensor]:
    """The tensors of a state by name."""
    return {name: x for name, x in state._asdict().items() if isinstance(x, Tensor)}


def positions(pattern: Sequence[str], kind: str) -> list[int]:
    """Where the blocks of a kind stand."""
    return [i for i, x in enumerate(pattern) if x == kind]
