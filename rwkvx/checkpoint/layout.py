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
from rwkvx.config import TOKENIZERS, ModelConfig, spread
from rwkvx.dtypes import FLOATS
from rwkvx.errors import InputError
from rwkvx.kinds import KINDS
from rwkvx.kinds.contract import ShapeOf, positions

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
        name: by which kinds of block say where theirs are (`Mixer.prefixes`).
        rename: our name, and the pattern of blocks, to the name in the file.
        deep: finds our names of the vectors that are stored as [1, 1, C].
        transposed: the low-rank matrices are stored transposed with respect to BlinkDL's and ours.
        unused: finds names of the file that no model uses.
    """

    name: str
    rename: Callable[[str, Pattern], str]
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

    @property
    def kinds(self) -> dict[str, str]:
        """The kinds of block that the layout has a place for, and what stands before a number."""
        found = {kind: KINDS[kind].prefixes.get(self.name) for kind in KINDS}
        return {kind: prefix for kind, prefix in found.items() if prefix is not None}

    def no_place(self, config: ModelConfig) -> str | None:
        """Tensors of a model that the layout has no names for, in words; None if there are none."""
        kinds = self.kinds
        beyond = [KINDS[kind].beyond_layouts(config) for kind in config.pattern if kind in kinds]
        missing = [f"{kind} blocks" for kind in config.pattern if kind not in kinds]
        missing += [words for words in beyond if words]
        if (first := next(iter(kinds))) not in config.pattern:
            missing = [f"a model without {first} blocks"]
        return missing[0] if missing else None

    def check_place(self, config: ModelConfig, what: str) -> None:
        """Raise InputError for a model that the layout cannot hold; `what` names the layout."""
        if words := self.no_place(config):
            raise InputError(f"{what} has no place for {words}")

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
        counts = {kind: _depth(prefix, raw, origin) for kind, prefix in self.kinds.items()}
        first = next(iter(counts))
        if not counts[first]:
            raise InputError(f"{origin} holds {by_names(raw) or f'no {first} block'}")
        if wanted is None:
            try:
                return usual_pattern(counts)
            except InputError as error:
                raise InputError(f"{origin}: {error}") from error
        pattern = tuple(wanted)
        asked = {kind: pattern.count(kind) for kind in counts}
        if asked != counts or len(pattern) != sum(counts.values()):
            raise InputError(f"{origin} holds {_words(counts)} blocks, the pattern {_words(asked)}")
        return pattern

    def _sizes(self, raw: Tensors, origin: str, pattern: Pattern) -> dict[str, Any]:
        """What the shapes of tensors tell of the config."""

        def matrix(ours: str) -> torch.Size:
            theirs = self.rename(ours, pattern)
            x = self._ours(ours, _get(raw, theirs, origin))
            if x.dim() != 2 or 0 in x.shape:
                raise InputError(f"{origin}: {theirs} is {list(x.shape)}, expected a matrix")
            return x.shape

        def shape_of(kind: str) -> ShapeOf:
            places = positions(pattern, kind)

            def shape(name: str, nth: int) -> torch.Size | None:
                return matrix(f"blocks.{places[nth]}.{name}") if nth < len(places) else None

            return shape

        vocab, width = matrix("emb.weight")
        first = "blocks.0.ffn.key.weight"
        inner = matrix(first)[0]
        if inner % width:
            raise InputError(
                f"{origin}: {self.rename(first, pattern)} has {inner} rows, which is no multiple "
                f"of the width {width}"
            )
        sizes = {
            "vocab_size": vocab,
            "width": width,
            "pattern": pattern,
            "ffn_mult": inner // width,
            "tokenizer": _TOKENIZER_OF.get(vocab),
        }
        for kind in dict.fromkeys(pattern):
            sizes |= KINDS[kind].sizes(shape_of(kind))
        return sizes


def usual_pattern(counts: Mapping[str, int]) -> Pattern:
    """So many blocks of each kind in the usual order: the others spread between those of the first.

    Raises:
        InputError: they cannot be spread evenly.
    """
    (base, many), *others = counts.items()
    found = [(kind, count) for kind, count in others if count]
    if len(found) > 1:
        raise InputError("blocks of three kinds have no usual order: give a pattern")
    other, few = found[0] if found else (base, 0)
    return spread(base, many, other, few)


def index_in_kind(position: int, pattern: Pattern) -> int:
    """How many blocks of the same kind stand before the block at `position`."""
    return pattern[:position].count(pattern[position])


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


def _depth(prefix: str, raw: Tensors, origin: str) -> int:
    """Number of blocks; InputError where one between others is missing."""
    finder = re.compile(rf"{re.escape(prefix)}(\d+)\.")
    found = {int(m[1]) for name in raw if (m := finder.match(name))}
    for missing in sorted(set(range(len(found))) - found):
        raise InputError(f"{origin} lacks the block {prefix}{missing}")
    return len(found)


def _words(counts: Mapping[str, int]) -> str:
    return " and ".join(f"{count} {kind}" for kind, count in counts.items())
