"""What a passkey run will read: samples, keys of the journal, tokens, batches."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from rwkvx.data.passkey import Filler, PasskeyBuilder, draw_key
from rwkvx.errors import InputError, shown
from rwkvx.ranges import COUNT, TOKENS, Whole, check
from rwkvx_evals.files import code_fingerprint, digest

DEPTHS = Whole(1, 1000)
MOST_SAMPLES = 100_000
_UNITS = {"": 1, "k": 1024, "m": 1024 * 1024}


def parse_length(text: str) -> int:
    """`4096`, `4k` (× 1024) or `1m` (× 1024²) as tokens; raises InputError for anything else."""
    match = re.fullmatch(r"(\d{1,12})([km]?)", text.strip().lower())
    if match is None or int(match[1]) == 0:
        raise InputError(f"length {shown(text)} is not a positive number such as 1000, 4k or 1m")
    length = int(match[1]) * _UNITS[match[2]]
    check("length", length, TOKENS)
    return length


def parse_lengths(text: str) -> tuple[int, ...]:
    """A comma-separated list of lengths, sorted, each once."""
    return tuple(sorted({parse_length(part) for part in text.split(",")}))


def length_label(length: int) -> str:
    """4096 → "4k", 1048576 → "1m", others in full."""
    for unit in ("m", "k"):
        if length % _UNITS[unit] == 0:
            return f"{length // _UNITS[unit]}{unit}"
    return str(length)


def depth_values(count: int) -> tuple[float, ...]:
    """`count` depths from 0 (right after the task) to 1 (right before the question)."""
    check("depths", count, DEPTHS)
    if count == 1:
        return (0.5,)
    return tuple(index / (count - 1) for index in range(count))


@dataclass(frozen=True)
class Settings:
    """Everything that decides the answers of a run, besides the model."""

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    seeds: int
    max_new_tokens: int
    dtype: str

    def __post_init__(self) -> None:
        check("seeds", self.seeds, COUNT)
        check("max_new_tokens", self.max_new_tokens, TOKENS)
        samples = len(self.lengths) * len(self.depths) * self.seeds
        if samples > MOST_SAMPLES:
            raise InputError(
                f"{samples:,} samples (lengths × depths × seeds): at most {MOST_SAMPLES:,} at once"
            )


@dataclass(frozen=True)
class Sample:
    """One question: where the needle lies, and the key that it holds."""

    length: int
    depth: float
    seed: int
    passkey: int
    key: str


@dataclass(frozen=True)
class Group:
    """The samples of one length and depth: they share everything before the needle."""

    length: int
    depth: float
    prefix_length: int
    samples: tuple[Sample, ...]

    @property
    def tail_length(self) -> int:
        """Tokens from the needle to the end of the prompt."""
        return self.length - self.prefix_length


class Plan:
    """All groups of a run, by length and then by depth, with what each costs."""

    def __init__(
        self, settings: Settings, builder: PasskeyBuilder, filler: Filler, weights: str
    ) -> None:
        """weights: the model's fingerprint. Raises InputError for a length that is too short."""
        self.settings, self.builder, self.filler = settings, builder, filler
        sha = hashlib.sha256(filler.head.tobytes())
        sha.update(b"|" + filler.period.tobytes())
        common = {
            "task": "passkey",
            "weights": weights,
            "code": code_fingerprint(),
            "filler": sha.hexdigest(),
            "fixed": builder.prefix(filler, builder.minimum, 0.0).tolist(),
            "max_new_tokens": settings.max_new_tokens,
            "dtype": settings.dtype,
        }
        self._common = digest(common)
        self.groups = {
            length: tuple(self._group(length, depth) for depth in settings.depths)
            for length in settings.lengths
        }

    def _group(self, length: int, depth: float) -> Group:
        samples = []
        for seed in range(self.settings.seeds):
            passkey = draw_key(seed, length, depth)
            key = digest([self._common, length, depth, seed, passkey])
            samples.append(Sample(length, depth, seed, passkey, key))
        prefix_length = self.builder.prefix_length(length, depth)
        return Group(length, depth, prefix_length, tuple(samples))

    @property
    def samples(self) -> list[Sample]:
        """Every sample, in the order of the report."""
        return [s for groups in self.groups.values() for group in groups for s in group.samples]

    def naive_tokens(self) -> int:
        """Prompt tokens when every sample is read from its start."""
        return sum(sample.length for sample in self.samples)

    def shared_tokens(self) -> int:
        """Prompt tokens with the prefix of each length read once."""
        return sum(cost_of(groups, groups) for groups in self.groups.values())


def cost_of(groups: Sequence[Group], wanted: Sequence[Group]) -> int:
    """Prompt tokens to read for the `wanted` groups of one length."""
    if not wanted:
        return 0
    tails = sum(group.tail_length * len(group.samples) for group in wanted)
    return max(group.prefix_length for group in wanted) + tails
