"""The shape of a model, as plain data."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from math import sqrt
from typing import Annotated, Any

from rwkvx.errors import InputError, shown
from rwkvx.ranges import Each, Number, OneOf, Whole, check_ranges
from rwkvx_kernels.names import SELECTIONS

TOKENIZERS = {"world": 65536, "bytes": 256}  # and how many ids they have
TOKENIZER_FILE, TOKENIZER_JSON = "file", "tokenizer.json"  # the latter beside the weights
TOKENIZER_CONFIG = "tokenizer_config.json"  # what is added to a tokenizer, beside it

# Far beyond any model, far below what would only be found out by running out of memory.
_Width = Whole(1, 1 << 16)
_Rank = Annotated[int | None, _Width]
_BLOCKS = Whole(0, 1024)


class _Kind:
    """A range: names of kinds of block. They are looked up when needed, as they bring torch."""

    @property
    def words(self) -> str:
        from rwkvx.kinds import KINDS

        return OneOf(*KINDS).words

    def holds(self, value: Any) -> bool:
        from rwkvx.kinds import KINDS

        return OneOf(*KINDS).holds(value)

    def parse(self, text: str) -> str:
        return text


@dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the parameters and the function of a model.

    Attributes:
        vocab_size: rows of the embedding and of the head.
        width: channels C of the residual stream.
        pattern: kind of each block from the input to the output: "rwkv7", "sparse", "window".
        head_size: channels N of a head, in every kind of block.
        chunk_size, topk: sparse attention: tokens of a chunk; chunks read by a query, its own
            included.
        selection: how past chunks are chosen, "flat" (all are scored) or "coarse_to_fine" (a tree
            of chunks is descended: near-linear cost, nearly always the same chunks).
        sparse_kv_heads: key/value heads of blocks that attend (grouped-query attention); None for
            as many as query heads.
        key_conv: width of the causal depthwise convolution on the keys of sparse blocks; 0: none.
        ffn_mult: inner width of the channel mix, in multiples of `width`.
        decay_rank, iclr_rank, value_rank, gate_rank: low-rank sizes of the time mix (w, a, v, g);
            None for RWKV-7's own rule.
        group_norm_eps: of the group norm in the time mix; RWKV-7's own number unless a checkpoint
            of another kind says otherwise.
        tokenizer: "world", "bytes", "file" for the tokenizer.json in the model's folder, or None
            for a vocabulary without one.
        options: fields that single kinds of block bring (rwkvx/kinds), such as `window`; as plain
            data they stand beside the others.

    Raises:
        InputError: a value out of its range, by name, or values that do not fit together.
    """

    vocab_size: Annotated[int, Whole(1, 1 << 24)]
    width: Annotated[int, _Width]
    pattern: Annotated[tuple[str, ...], Each(_Kind(), 1, _BLOCKS.most)]
    head_size: Annotated[int, _Width] = 64
    chunk_size: Annotated[int, Whole(1, 1 << 24)] = 2048
    topk: Annotated[int, Whole(1, 1 << 20)] = 3
    selection: Annotated[str, OneOf(*SELECTIONS)] = "flat"
    sparse_kv_heads: Annotated[int | None, _Width] = None
    key_conv: Annotated[int, Whole(0, 256)] = 0
    ffn_mult: Annotated[int, Whole(1, 64)] = 4
    decay_rank: _Rank = None
    iclr_rank: _Rank = None
    value_rank: _Rank = None
    gate_rank: _Rank = None
    group_norm_eps: Annotated[float, Number(1e-12, 0.1)] = 64e-5
    tokenizer: Annotated[str | None, OneOf(*TOKENIZERS, TOKENIZER_FILE)] = "world"
    options: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_ranges(self)
        object.__setattr__(self, "pattern", tuple(self.pattern))
        if self.width % self.head_size:
            raise InputError(f"width {self.width} is no multiple of head_size {self.head_size}")
        self._check_kinds()

    def _check_kinds(self) -> None:
        """Let every kind look at the config, and fill in the options of those in the pattern."""
        from rwkvx.kinds import kind_of, options  # brings torch, which a config does without

        known, filled = options(), dict[str, int]()
        for name, value in self.options.items():
            if name not in known:
                raise InputError(f"unknown option {shown(name)}; known: {', '.join(sorted(known))}")
            if not known[name].range.holds(value):
                words = known[name].range.words
                raise InputError(f"{name} must be {words}, got {shown(value)}")
        for kind in dict.fromkeys(self.pattern):
            kind_of(kind).check_config(self)
            filled |= {name: option.default for name, option in kind_of(kind).options.items()}
        object.__setattr__(self, "options", {**filled, **self.options})

    def option(self, name: str) -> int:
        """The value of an option of a kind in the pattern."""
        return self.options[name]

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.width // self.head_size

    @property
    def kv_heads(self) -> int:
        """Key/value heads of blocks that attend."""
        return self.sparse_kv_heads or self.heads

    @property
    def ranks(self) -> dict[str, int]:
        """Low-rank sizes by letter. RWKV-7's rule for new models, rounded to multiples of 32."""
        own = {"w": self.decay_rank, "a": self.iclr_rank, "v": self.value_rank, "g": self.gate_rank}
        factor = {"w": 2.5, "a": 2.5, "v": 1.7, "g": 5.0}
        return {
            x: rank or max(32, round(factor[x] * sqrt(self.width) / 32) * 32)
            for x, rank in own.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `from_dict` takes it."""
        data = asdict(self)
        return {**data.pop("options"), **data, "pattern": list(self.pattern)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ModelConfig":
        """Build from plain data; an unknown or missing key is an `InputError`."""
        from rwkvx.kinds import options

        known = field_names()
        unknown = sorted(set(data) - known, key=str)
        if unknown:
            raise InputError(
                f"unknown model key {shown(unknown[0])}; known: {', '.join(sorted(known))}"
            )
        missing = sorted({"vocab_size", "width", "pattern"} - set(data))
        if missing:
            raise InputError(f"the model config lacks {missing[0]!r}")
        own = {name: value for name, value in data.items() if name not in options()}
        return cls(**own, options={n: x for n, x in data.items() if n in options()})


def field_names() -> set[str]:
    """Of a config as plain data: those of `ModelConfig`, and the options of all kinds of block."""
    from rwkvx.kinds import options

    return {*(f.name for f in fields(ModelConfig)), *options()} - {"options"}


def hybrid_pattern(rwkv_blocks: int, sparse_blocks: int) -> tuple[str, ...]:
    """L // M RWKV-7 blocks, then one sparse block, repeated: the order of RWKV-X.

    Raises:
        InputError: M does not divide L (the reference code drops the rest; give a pattern instead),
            or more blocks than a model may have.
    """
    return spread("rwkv7", rwkv_blocks, "sparse", sparse_blocks)


def spread(base: str, many: int, other: str, few: int) -> tuple[str, ...]:
    """`many` blocks of one kind, and after every many // few of them one of another.

    Raises:
        InputError: `few` does not divide `many`, or more blocks than a model may have.
    """
    for count in (many, few):
        if not _BLOCKS.holds(count):
            raise InputError(f"the number of blocks must be {_BLOCKS.words}, got {shown(count)}")
    if few == 0:
        return (base,) * many
    if many % few:
        raise InputError(
            f"{many} {base} blocks cannot be spread evenly before {few} {other} blocks: give an "
            "explicit pattern, or a divisor"
        )
    return ((base,) * (many // few) + (other,)) * few
