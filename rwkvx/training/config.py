"""What a training run is, as frozen data: YAML files, overridden field by field."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from dacite import Config, DaciteError, UnexpectedDataError, from_dict

from rwkvx.config import ModelConfig
from rwkvx.errors import InputError, shown
from rwkvx.files import parse_yaml, read_yaml, user_path
from rwkvx.ranges import SEED, THREADS, Number, OneOf, Whole, check, check_ranges


@dataclass(frozen=True)
class StageConfig:
    """A part of the run with one sequence length.

    Attributes:
        steps: optimiser steps of this stage.
        length: tokens of a sequence.
        batch: sequences of a micro-batch.
        state_passing: share of sequences that start from the final recurrent state of a sequence
            of the step before (arXiv 2507.02782), so that states far older than `length` are seen.
        recurrent_length: RWKV-7 blocks read a sequence in pieces of so many tokens, every later
            piece from a state passed on from anywhere, while attention sees the whole: what lies
            further back can then only be recalled through attention, as it must be at any
            distance. 0 reads whole sequences.
        topk: chunks that a query reads in this stage, 0 for the model's own. Fewer make the right
            chunk compete harder: at a few thousand tokens it must already win as at a million.
        prose: passkey: `data.prose` of this stage, -1 for the same.
        noise: passkey: largest share of prose tokens that random ones replace, drawn for each
            sample: other text holds tokens that the prose of `data.paths` never shows.
        numbers: passkey: most numbers written over a thousand tokens of prose, drawn for each
            sample: digits that are not the key's, as in a list of ages or dates.
    """

    steps: int
    length: int
    batch: int
    state_passing: float = 0.0
    recurrent_length: int = 0
    topk: int = 0
    prose: float = -1.0
    noise: float = 0.0
    numbers: float = 0.0

    @property
    def pieces(self) -> int:
        """Pieces of a sequence in RWKV-7 blocks."""
        return self.length // self.recurrent_length if self.recurrent_length else 1


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from.

    Attributes:
        kind: "passkey" (synthetic, fresh samples), "text" (files) or "hub" (Hugging Face).
        paths: text files (.txt, .xz, .jsonl with a "text" field, .tar.xz of .txt), relative to
            the data folder; for "passkey", the prose used as filler; for "hub", name and subset.
        prose: passkey: share of samples whose filler is prose, the rest has the standard sentences.
        other_weight: passkey: weight of the mean loss over other tokens beside that of the answers.
        ask_again: passkey: share of the pieces (`recurrent_length`) between the needle's and the
            last that ask for the key as well: more to learn from a long sequence.
        limit_mb: read at most so many megabytes of text.
        split: hub: the split to read.
    """

    kind: str
    paths: tuple[str, ...] = ()
    prose: float = 0.5
    other_weight: float = 0.2
    ask_again: float = 0.0
    limit_mb: float = 1024.0
    split: str = "train"


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with RWKV-7's parameter groups and a schedule.

    Attributes:
        lr: peak learning rate; warmup: steps of linear rise; schedule: "cosine" or "wsd" (constant,
            then linear decay over the last `decay` share of the run); final: last rate / peak.
    """

    lr: Annotated[float, Number(0, 10)] = 1.0e-3
    betas: tuple[float, float] = (0.9, 0.99)
    eps: Annotated[float, Number(0, 1)] = 1.0e-18
    weight_decay: Annotated[float, Number(0, 10)] = 0.1
    clip: Annotated[float, Number(0, 1e12, above=True)] = 1.0
    warmup: Annotated[int, Whole(0, 10**9)] = 50
    schedule: Annotated[str, OneOf("cosine", "wsd")] = "cosine"
    decay: Annotated[float, Number(0, 1)] = 0.2
    final: Annotated[float, Number(0, 1)] = 0.05

    def __post_init__(self) -> None:
        check_ranges(self)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas must be two numbers from 0 to below 1, got {self.betas}")


@dataclass(frozen=True)
class TrainConfig:
    """A whole run.

    Attributes:
        name: of the run; out: folder of its files (default runs/NAME).
        model: the architecture; init: weights to start from (a name or folder), else fresh ones.
        stages: run one after the other.
        steps: total steps, if fewer than the stages have; 0 for all of them.
        accumulate: micro-batches of a step.
        average: decay of the moving average of the weights that is evaluated and becomes the model
            (0.98 looks back 50 steps); 0 for the weights of the step itself.
        keep: "last": the weights at the end become the model; "best": those of the evaluation in
            the last stage that runs that had the lowest loss.
        precision: "float32" or "bf16" (autocast).
        eval_every, save_every: steps between evaluations and checkpoints. seed: of everything.
        threads: CPU threads, 0 for torch's own choice.
    """

    name: str
    model: ModelConfig
    data: DataConfig
    stages: tuple[StageConfig, ...]
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    out: str = ""
    init: str = ""
    steps: int = 0
    accumulate: int = 1
    average: float = 0.0
    keep: str = "last"
    precision: str = "float32"
    device: str = "cpu"
    gradient_checkpointing: bool = False
    eval_every: int = 200
    eval_batches: int = 4
    save_every: int = 200
    seed: int = 0
    threads: int = 0

    def __post_init__(self) -> None:
        _one_of("precision", self.precision, ("float32", "bf16"))
        _one_of("data.kind", self.data.kind, ("passkey", "text", "hub"))
        _one_of("keep", self.keep, ("last", "best"))
        if not self.stages:
            raise InputError("stages must hold at least one stage")
        for stage in self.stages:
            if stage.recurrent_length and stage.length % stage.recurrent_length:
                raise InputError(f"length must be a multiple of recurrent_length: {stage}")
            if min(stage.steps, stage.length, stage.batch) < 1:
                raise InputError(f"steps, length and batch of a stage must be >= 1: {stage}")
            if min(stage.recurrent_length, stage.topk) < 0:
                raise InputError(f"recurrent_length and topk of a stage must be >= 0: {stage}")
            if min(stage.noise, stage.numbers) < 0 or stage.noise > 1:
                raise InputError(f"noise (at most 1) and numbers must be >= 0: {stage}")
            if not 0 <= stage.state_passing <= 1:
                raise InputError(f"state_passing must be between 0 and 1: {stage}")
        if not 0 <= self.average < 1:
            raise InputError(f"average must be at least 0 and below 1, got {self.average}")
        for name in ("accumulate", "eval_every", "eval_batches", "save_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("steps", "threads", "seed"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be >= 0, got {getattr(self, name)}")
        check("threads", self.threads or 1, THREADS)
        check("seed", self.seed, SEED)

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the run."""
        planned = sum(stage.steps for stage in self.stages)
        return min(self.steps, planned) if self.steps else planned

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return Path(self.out or f"runs/{self.name}")

    def stage(self, step: int) -> StageConfig:
        """The stage that step number `step` (from 0) belongs to."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        return self.stages[-1]


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(f"{name} must be one of {known}, got {value!r}")


def read_config(path: str | Path, overrides: Mapping[str, str] | None = None) -> TrainConfig:
    """Read a YAML file and set fields by dotted name ("optimizer.lr"), values in YAML syntax.

    Raises:
        InputError: unreadable file, unknown key, wrong type.
    """
    try:
        data = read_yaml(user_path(path))
    except InputError as error:
        raise InputError(f"cannot read config {path}: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"config {path} holds no mapping")
    for name, text in (overrides or {}).items():
        _override(data, name, text)
    try:
        settings = Config(strict=True, type_hooks={float: _number, int: _integer, **_LISTS})
        return from_dict(TrainConfig, data, settings)
    except UnexpectedDataError as error:
        key = sorted(error.keys)[0]
        raise InputError(f"unknown key {key!r} in config {path}") from error
    except (DaciteError, TypeError, ValueError) as error:
        raise InputError(f"config {path}: {' '.join(str(error).split())}") from error


def _override(data: dict[str, Any], name: str, text: str) -> None:
    """Set one field by dotted name to a value in YAML syntax."""
    *parents, last = name.split(".")
    for key in parents:
        inner = data.setdefault(key, {})
        if not isinstance(inner, dict):
            raise InputError(f"cannot set {name}: {key} is no mapping")
        data = inner
    try:
        data[last] = parse_yaml(text, name)
    except InputError as error:
        raise InputError(f"{name}: {shown(text)} is not YAML") from error


# What has the wrong type becomes text: then dacite says so, with the name of the field.


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-3, without a point, as text."""
    try:
        return str(value) if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return str(value)


def _list(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else str(value)


def _integer(value: Any) -> Any:
    return str(value) if isinstance(value, bool) else value


_LISTS: dict[Any, Any] = dict.fromkeys(
    (tuple[str, ...], tuple[float, float], tuple[StageConfig, ...]), _list
)


def field_names(kind: type = TrainConfig, prefix: str = "") -> list[str]:
    """All fields by dotted name: what a command line can override."""
    names = []
    hints = get_type_hints(kind)
    for f in fields(kind):
        if is_dataclass(hints[f.name]):
            names += field_names(hints[f.name], f"{prefix}{f.name}.")
        else:
            names.append(prefix + f.name)
    return names
