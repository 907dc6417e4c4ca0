"""The shape of a model, as plain data."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import sqrt
from typing import Any

from rwkvx.errors import InputError
from rwkvx_kernels.names import SELECTIONS

BLOCK_KINDS = ("rwkv7", "sparse")
TOKENIZERS = {"world": 65536, "bytes": 256}  # and how many ids they have


@dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the parameters and the function of a model.

    Attributes:
        vocab_size: rows of the embedding and of the head.
        width: channels C of the residual stream.
        pattern: kind of each block from the input to the output, "rwkv7" or "sparse".
        head_size: channels N of a head, in both kinds of block.
        chunk_size, topk: sparse attention: tokens of a chunk; chunks read by a query, its own
            included.
        selection: how past chunks are chosen, "flat" (all are scored) or "coarse_to_fine" (a tree
            of chunks is descended: near-linear cost, nearly always the same chunks).
        sparse_kv_heads: key/value heads of the sparse blocks (grouped-query attention); None for
            as many as query heads.
        key_conv: width of the causal depthwise convolution on the keys of sparse blocks; 0: none.
        ffn_mult: inner width of the channel mix, in multiples of `width`.
        decay_rank, iclr_rank, value_rank, gate_rank: low-rank sizes of the time mix (w, a, v, g);
            None for RWKV-7's own rule.
        group_norm_eps: of the group norm in the time mix; RWKV-7's own number unless a checkpoint
            of another kind says otherwise.
        tokenizer: "world", "bytes", or None for a vocabulary that is neither.
    """

    vocab_size: int
    width: int
    pattern: tuple[str, ...]
    head_size: int = 64
    chunk_size: int = 2048
    topk: int = 3
    selection: str = "flat"
    sparse_kv_heads: int | None = None
    key_conv: int = 0
    ffn_mult: int = 4
    decay_rank: int | None = None
    iclr_rank: int | None = None
    value_rank: int | None = None
    gate_rank: int | None = None
    group_norm_eps: float = 64e-5
    tokenizer: str | None = "world"

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, list | tuple) or not self.pattern:
            raise InputError(f"pattern must name blocks of {BLOCK_KINDS}, got {self.pattern!r}")
        object.__setattr__(self, "pattern", tuple(self.pattern))
        for kind in self.pattern:
            if kind not in BLOCK_KINDS:
                raise InputError(f"pattern must name blocks of {BLOCK_KINDS}, got {kind!r}")
        if self.tokenizer is not None and self.tokenizer not in TOKENIZERS:
            raise InputError(
                f"tokenizer must be one of {tuple(TOKENIZERS)} or null, got {self.tokenizer!r}"
            )
        if not isinstance(self.group_norm_eps, float) or not 0 < self.group_norm_eps < 1:
            raise InputError(f"group_norm_eps must be in (0, 1), got {self.group_norm_eps!r}")
        if self.selection not in SELECTIONS:
            raise InputError(f"selection must be one of {SELECTIONS}, got {self.selection!r}")
        for name in ("vocab_size", "width", "head_size", "chunk_size", "topk", "ffn_mult"):
            if not _whole(getattr(self, name), 1):
                raise InputError(
                    f"{name} must be a positive whole number, got {getattr(self, name)!r}"
                )
        for name in ("sparse_kv_heads", "decay_rank", "iclr_rank", "value_rank", "gate_rank"):
            value = getattr(self, name)
            if value is not None and not _whole(value, 1):
                raise InputError(f"{name} must be a positive whole number or null, got {value!r}")
        if not _whole(self.key_conv, 0):
            raise InputError(f"key_conv must be 0 (none) or a width, got {self.key_conv!r}")
        if self.width % self.head_size:
            raise InputError(f"width {self.width} is no multiple of head_size {self.head_size}")
        if self.heads % self.kv_heads:
            raise InputError(f"{self.heads} heads are no multiple of {self.kv_heads} kv heads")

    @property
    def heads(self) -> int:
        """Query heads of both kinds of block."""
        return self.width // self.head_size

    @property
    def kv_heads(self) -> int:
        """Key/value heads of the sparse blocks."""
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
        return {**asdict(self), "pattern": list(self.pattern)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ModelConfig":
        """Build from plain data; an unknown or missing key is an `InputError`."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise InputError(f"unknown model key {unknown[0]!r}; known: {', '.join(sorted(known))}")
        missing = sorted({"vocab_size", "width", "pattern"} - set(data))
        if missing:
            raise InputError(f"the model config lacks {missing[0]!r}")
        return cls(**data)


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def hybrid_pattern(rwkv_blocks: int, sparse_blocks: int) -> tuple[str, ...]:
    """L // M RWKV-7 blocks, then one sparse block, repeated: the order of RWKV-X.

    Raises:
        InputError: M does not divide L (the reference code drops the rest; give a pattern instead).
    """
    if sparse_blocks == 0:
        return ("rwkv7",) * rwkv_blocks
    if rwkv_blocks % sparse_blocks:
        raise InputError(
            f"{rwkv_blocks} RWKV-7 blocks cannot be spread evenly before {sparse_blocks} sparse "
            "blocks: give an explicit pattern"
        )
    return (("rwkv7",) * (rwkv_blocks // sparse_blocks) + ("sparse",)) * sparse_blocks
