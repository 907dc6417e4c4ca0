"""How a foreign format names and shapes the tensors of a model, and what its tensors tell.

Reading goes from our names to theirs: each parameter of our model asks for its tensor, so what is
missing, extra or of a wrong shape is said in the file's own names.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rwkvx.checkpoint.checkpoint import Checkpoint, merge_config, parameter_shapes
from rwkvx.checkpoint.foreign import by_names
from rwkvx.config import TOKENIZERS, ModelConfig, hybrid_pattern
from rwkvx.dtypes import FLOATS
from rwkvx.errors import InputError

Pattern = tuple[str, ...]
Tensors = Mapping[str, Tensor]

BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")  # our names
LOW_RANK = re.compile(r"blocks\.\d+\.att\.[wavg][12]")
_TOKENIZER_OF = {ids: name for name, ids in TOKENIZERS.items()}  # other vocabularies have none
NOTHING = re.compile(r"(?!)")  # finds nothing
# The embedding of each layout, RWKV-X's and fla's before the one that both end in.
_ANCHORS = ("rwkv.emb.weight", "model.embeddings.weight", "emb.weight")


@dataclass(frozen=True)
class Layout:
    """One way of storing a model.

    Attributes:
        rename: our name, and the pattern of blocks, to the name in the file.
        blocks: kind of block to the pattern that finds its number in a name of the file.
        deep: finds our names of the vectors that are stored as [1, 1, C].
        transposed: the low-rank matrices are stored transposed with respect to BlinkDL's and ours.
        unused: finds names of the file that no model uses.
    """

    rename: Callable[[str, Pattern], str]
    blocks: Mapping[str, re.Pattern[str]]
    deep: re.Pattern[str]
    transposed: bool
    unused: re.Pattern[str]

    def read(
        self, raw: Tensors, origin: str, overrides: Mapping[str, Any], **known: Any
    ) -> Checkpoint:
        """The model that tensors by their names in the file hold.

        Args:
            overrides: fields of the config that the caller asked for. known: those that the file
                tells in other ways than by the shapes of its tensors.

        Raises:
            InputError: a block or tensor that is missing or too many, or a wrong shape, by name.
        """
        pattern = self._pattern(raw, origin, overrides.get("pattern"))
        config = merge_config({**self._sizes(raw, origin, pattern), **known}, overrides)
        return self.fit(raw, config, origin)

    def fit(self, raw: Tensors, config: ModelConfig, origin: str) -> Checkpoint:
        """The tensors by our names, each of them as `config` says it is.

        Raises:
            InputError: one that is missing, extra, of the wrong shape or dtype, by name.
        """
        tensors, wanted = {}, set()
        for ours, shape in parameter_shapes(config).items():
            theirs = self.rename(ours, config.pattern)
            x = self._ours(ours, _get(raw, theirs, origin))
            if x.shape != shape:
                stored = self._theirs(ours, torch.empty(shape, device="meta")).shape
                raise InputError(
                    f"{origin}: {theirs} is {list(raw[theirs].shape)}, expected {list(stored)}"
                )
            if str(x.dtype).removeprefix("torch.") not in FLOATS:
                raise InputError(
                    f"{origin}: {theirs} is of {x.dtype}, expected floating point of 16, 32 or 64 "
                    "bits: take the model before it was quantised"
                )
            tensors[ours] = x
            wanted.add(theirs)
        for name in sorted(set(raw) - wanted):
            if not self.unused.fullmatch(name):
                if words := by_names([name]):
                    raise InputError(f"{origin} holds {words}")
                raise InputError(f"{origin} has a tensor that the model has no place for: {name}")
        return Checkpoint(config, tensors)

    def write(self, checkpoint: Checkpoint) -> dict[str, Tensor]:
        """Contiguous CPU tensors by their names in the file."""
        pattern = checkpoint.config.pattern
        return {
            self.rename(name, pattern): self._theirs(name, x.detach().cpu()).contiguous()
            for name, x in checkpoint.tensors.items()
        }

    def _ours(self, name: str, x: Tensor) -> Tensor:
        if self.transposed and LOW_RANK.fullmatch(name) and x.dim() == 2:
            return x.t().contiguous()
        return x.flatten() if x.dim() == 3 and x.shape[:2] == (1, 1) else x

    def _theirs(self, name: str, x: Tensor) -> Tensor:
        if self.transposed and LOW_RANK.fullmatch(name):
            return x.t()
        return x.view(1, 1, -1) if self.deep.search(name) else x

    def _pattern(self, raw: Tensors, origin: str, wanted: Any) -> Pattern:
        """The pattern that the caller wants, if it fits the number of blocks, else the usual."""
        depth = {kind: _depth(finder, raw, origin) for kind, finder in self.blocks.items()}
        rwkv, sparse = depth["rwkv7"], depth.get("sparse", 0)
        if not rwkv:
            raise InputError(f"{origin} holds {by_names(raw) or 'no block of RWKV-7'}")
        if wanted is None:
            try:
                return hybrid_pattern(rwkv, sparse)
            except InputError as error:
                raise InputError(f"{origin}: {error}") from error
        pattern = tuple(wanted)
        if (pattern.count("rwkv7"), pattern.count("sparse")) != (rwkv, sparse):
            raise InputError(
                f"{origin} holds {rwkv} RWKV-7 and {sparse} sparse blocks, the pattern "
                f"{pattern.count('rwkv7')} and {pattern.count('sparse')}"
            )
        return pattern

    def _sizes(self, raw: Tensors, origin: str, pattern: Pattern) -> dict[str, Any]:
        """What the shapes of tensors tell of the config."""
        positions = [i for i, kind in enumerate(pattern) if kind == "rwkv7"]
        block = f"blocks.{positions[0]}"

        def shape(ours: str) -> torch.Size:
            theirs = self.rename(ours, pattern)
            x = self._ours(ours, _get(raw, theirs, origin))
            if x.dim() != 2 or 0 in x.shape:
                raise InputError(f"{origin}: {theirs} is {list(x.shape)}, expected a matrix")
            return x.shape

        vocab, width = shape("emb.weight")
        # The first block has no value residual.
        value = f"blocks.{positions[1]}.att.v1" if len(positions) > 1 else None
        inner = shape(f"{block}.ffn.key.weight")[0]
        if inner % width:
            raise InputError(
                f"{origin}: {self.rename(f'{block}.ffn.key.weight', pattern)} has {inner} rows, "
                f"which is no multiple of the width {width}"
            )
        return {
            "vocab_size": vocab,
            "width": width,
            "pattern": pattern,
            "head_size": shape(f"{block}.att.r_k")[1],
            "ffn_mult": inner // width,
            "decay_rank": shape(f"{block}.att.w1")[1],
            "iclr_rank": shape(f"{block}.att.a1")[1],
            "value_rank": shape(value)[1] if value else None,
            "gate_rank": shape(f"{block}.att.g1")[1],
            "tokenizer": _TOKENIZER_OF.get(vocab),
        }


def index_in_kind(position: int, pattern: Pattern) -> int:
    """How many blocks of the same kind stand before the block at `position`."""
    return pattern[:position].count(pattern[position])


def refuse_sparse(config: ModelConfig, what: str) -> None:
    """Raise InputError where a layout for pure RWKV-7 is to hold a hybrid."""
    if "sparse" in config.pattern:
        raise InputError(f"{what} has no place for sparse blocks")


def without_prefix(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The same by plain names, without what a wrapper has put before each of them.

    Such as "module." (data parallel), "_orig_mod." (torch.compile), "model." and several in a row.
    """
    for anchor in _ANCHORS:
        for name in raw:
            prefix = name.removesuffix(anchor)
            if prefix != name and prefix.endswith(".") and anchor not in raw:
                return {n.removeprefix(prefix): x for n, x in raw.items()}
            if prefix == "":
                return dict(raw)
    return dict(raw)


def _get(raw: Tensors, name: str, origin: str) -> Tensor:
    if name not in raw:
        if words := by_names(raw):
            raise InputError(f"{origin} holds {words}")
        raise InputError(f"{origin} lacks the tensor {name}")
    return raw[name]


def _depth(finder: re.Pattern[str], raw: Tensors, origin: str) -> int:
    """Number of blocks; InputError where one between others is missing."""
    found = {int(m[2]): m[1] for name in raw if (m := finder.match(name))}
    prefix = next(iter(found.values()), "")
    for missing in sorted(set(range(len(found))) - set(found)):
        raise InputError(f"{origin} lacks the block {prefix}{missing}")
    return len(found)
