"""What a training run is, as frozen data: YAML files, overridden field by field."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from rwkvx.adapters import AdapterConfig
from rwkvx.config import ModelConfig
from rwkvx.data.sources import Data, read_data
from rwkvx.errors import InputError, shown
from rwkvx.files import parse_yaml, read_yaml, user_path
from rwkvx.kinds import options
from rwkvx.ranges import Each, Number, OneOf, Whole, check_ranges
from rwkvx.settings import from_plain

_NAME = re.compile(r"(?!\.)[\w.+-]{1,100}")  # of a folder as well
_Steps = Whole(1, 10**9)
_Tokens = Whole(0, 1 << 24)


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
        learn: "all" weights, or only those of "sparse" blocks: new ones beside trained ones.
        long_ce: largest weight of a target whose loss a long context lowers (LongCE, arXiv
            2410.23771; its code has 5, RWKV-X's 10), and long_ce_window: tokens of the windows that
            are read with a short context to compare; 0 weighs all targets alike.
        data: in YAML, what differs from the run's data, or another list of sources; None for the
            run's own.
    """

    steps: Annotated[int, _Steps]
    length: Annotated[int, Whole(1, 1 << 24)]
    batch: Annotated[int, Whole(1, 1 << 20)]
    state_passing: Annotated[float, Number(0, 1)] = 0.0
    recurrent_length: Annotated[int, _Tokens] = 0
    topk: Annotated[int, Whole(0, 1 << 20)] = 0
    learn: Annotated[str, OneOf("all", "sparse")] = "all"
    long_ce: Annotated[float, Number(0, 1000)] = 0.0
    long_ce_window: Annotated[int, Whole(1, 1 << 24)] = 4096
    data: Data | None = None

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.recurrent_length and self.length % self.recurrent_length:
            raise InputError(
                f"length must be a multiple of recurrent_length, got {self.length} and "
                f"{self.recurrent_length}"
            )
        if self.long_ce and self.length % self.long_ce_window:
            raise InputError(
                f"length must be a multiple of long_ce_window, got {self.length} and "
                f"{self.long_ce_window}"
            )

    @property
    def pieces(self) -> int:
        """Pieces of a sequence in RWKV-7 blocks."""
        return self.length // self.recurrent_length if self.recurrent_length else 1


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with RWKV-7's parameter groups and a schedule.

    Attributes:
        lr: peak learning rate.
        betas: decay of AdamW's first and second moment.
        eps: added to the root of the second moment.
        weight_decay: of the projections, the embedding and the head; other weights have none.
        clip: largest norm of the gradient, over all weights.
        warmup: steps of linear rise.
        schedule: "cosine", or "wsd": constant, then linear decay.
        decay: share of the run, at its end, over which "wsd" falls to `final`.
        final: last rate / peak.
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
        model: the architecture; where `init` is given, only what differs from that model's.
        data: where the tokens come from, see `rwkvx.data.sources`.
        stages: run one after the other.
        optimizer: AdamW and its schedule.
        tokenizer: folder with the tokenizer.json of a model whose config says "file".
        init: weights to start from (a name or folder), else fresh ones.
        steps: total steps, if fewer than the stages have; 0 for all of them.
        adapter: train an adapter beside the model of `init` in place of the model.
        accumulate: micro-batches of a step.
        average: decay of the moving average of the weights that is evaluated and becomes the model
            (0.98 looks back 50 steps); 0 for the weights of the step itself.
        keep: "last": the weights at the end become the model; "best": those of the evaluation in
            the last stage that runs that had the lowest loss.
        precision: "float32" or "bf16" (autocast; weights, gradients and moments stay float32).
        parallel: of several processes, "ddp": each has the whole model, "fsdp": a part of it.
        sequence_parallel: so many processes read each sequence together, a part of its tokens each.
        device: "cpu", "cuda", "cuda:1", "mps".
        gradient_checkpointing: keep one tensor for each block and compute the rest again in the
            backward pass: less memory, more arithmetic.
        compile: let torch.compile fuse what a block does beside its kernels; half a minute first.
        most_skipped: steps in a row that a loss or gradient that is not finite may leave without
            an update; one more ends the run.
        eval_every, save_every: steps between evaluations and checkpoints. seed: of everything.
        eval_batches: batches of an evaluation.
        save_minutes: a checkpoint also whenever so many minutes have passed, 0 for none.
        keep_checkpoints: how many checkpoints stay, the newest ones.
        samples: prompts that are continued at every evaluation, to be read in samples.jsonl.
        probe: lengths in tokens of passkey prompts that are answered at every evaluation.
        track: "wandb" or "trackio", where one of them is installed, "" for none.
        threads: CPU threads, 0 for torch's own choice.
    """

    name: str
    model: ModelConfig
    data: Data
    stages: tuple[StageConfig, ...]
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    out: str = ""
    tokenizer: str = ""
    init: str = ""
    steps: Annotated[int, Whole(0, 10**9)] = 0
    accumulate: Annotated[int, Whole(1, 1 << 20)] = 1
    average: Annotated[float, Number(0, 0.999999)] = 0.0
    keep: Annotated[str, OneOf("last", "best")] = "last"
    parallel: Annotated[str, OneOf("ddp", "fsdp")] = "ddp"
    sequence_parallel: Annotated[int, Whole(1, 1 << 16)] = 1
    precision: Annotated[str, OneOf("float32", "bf16")] = "float32"
    device: str = "cpu"
    gradient_checkpointing: bool = False
    compile: bool = False
    most_skipped: Annotated[int, Whole(0, 10**6)] = 10
    eval_every: Annotated[int, _Steps] = 200
    eval_batches: Annotated[int, Whole(1, 10**6)] = 4
    save_every: Annotated[int, _Steps] = 200
    save_minutes: Annotated[float, Number(0, 1e6)] = 0.0
    keep_checkpoints: Annotated[int, Whole(1, 10**6)] = 1
    samples: tuple[str, ...] = ()
    probe: Annotated[tuple[int, ...], Each(Whole(1, 1 << 24), 0, 20)] = ()
    track: Annotated[str, OneOf("", "wandb", "trackio")] = ""
    seed: Annotated[int, Whole(0, (1 << 63) - 1)] = 0
    threads: Annotated[int, Whole(0, 1024)] = 0

    def __post_init__(self) -> None:
        check_ranges(self)
        if not _NAME.fullmatch(self.name):
            raise InputError(
                f"name must be 1 to 100 letters, digits and any of ._+-, got {shown(self.name)}"
            )
        if self.adapter.kind:
            self._check_adapter()
        for i, stage in enumerate(self.stages):
            if self.sequence_parallel > 1 and (stage.recurrent_length or stage.long_ce):
                raise InputError(
                    f"stages[{i}]: with sequence_parallel, recurrent_length and long_ce must be 0"
                )
        if not self.stages:
            raise InputError("stages must hold at least one stage")
        if len(self.stages) > 1000:
            raise InputError(f"stages must hold at most 1000 stages, got {len(self.stages)}")

    def _check_adapter(self) -> None:
        kind = self.adapter.kind
        if not self.init:
            raise InputError(f"adapter {kind} needs init, the model that it is added to")
        if self.parallel == "fsdp":
            raise InputError(f"adapter {kind} is not cut in parts: set parallel to ddp")
        for stage in self.stages:
            if stage.learn != "all":
                raise InputError(f"adapter {kind} leaves the model as it is: learn must be all")
            if kind == "state" and (stage.state_passing or stage.recurrent_length):
                raise InputError(
                    "adapter state is what sequences start from: state_passing and "
                    "recurrent_length must be 0"
                )

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the run."""
        planned = sum(stage.steps for stage in self.stages)
        return min(self.steps, planned) if self.steps else planned

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return user_path(self.out or f"runs/{self.name}")

    def stage_start(self, number: int) -> int:
        """The step (from 0) that a stage begins with."""
        return sum(stage.steps for stage in self.stages[:number])

    def tokens_until(self, step: int) -> int:
        """Tokens of the first `step` steps."""
        tokens = 0
        for number, stage in enumerate(self.stages):
            begun = step - self.stage_start(number)
            last = number == len(self.stages) - 1
            steps = max(0, begun if last else min(begun, stage.steps))
            tokens += steps * stage.length * stage.batch * self.accumulate
        return tokens

    def to_dict(self) -> dict[str, Any]:
        """As in YAML, every field spelled out."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            **found,
            "model": self.model.to_dict(),
            "data": self.data.to_dict(),
            "samples": list(self.samples),
            "probe": list(self.probe),
            "adapter": {**vars(self.adapter), "targets": list(self.adapter.targets)},
            "optimizer": {**vars(self.optimizer), "betas": list(self.optimizer.betas)},
            "stages": [_stage_dict(stage) for stage in self.stages],
        }

    def stage_at(self, step: int) -> tuple[int, int]:
        """Number of the stage that step number `step` (from 0) belongs to, and the step in it."""
        for number, stage in enumerate(self.stages[:-1]):
            if step < stage.steps:
                return number, step
            step -= stage.steps
        return len(self.stages) - 1, step

    def stage(self, step: int) -> StageConfig:
        """The stage that step number `step` (from 0) belongs to."""
        return self.stages[self.stage_at(step)[0]]

    def data_of(self, stage: StageConfig) -> Data:
        """What the stage reads."""
        return self.data if stage.data is None else stage.data


def _stage_dict(stage: StageConfig) -> dict[str, Any]:
    found = dict(vars(stage))
    data = found.pop("data")
    return found if data is None else {**found, "data": data.to_dict()}


def read_config(path: str | Path, overrides: Mapping[str, str] | None = None) -> TrainConfig:
    """Read a YAML file and set fields by dotted name ("optimizer.lr"), values in YAML syntax.

    Raises:
        InputError: unreadable file, unknown key, wrong type, a value out of its range.
    """
    data, where = read_yaml(user_path(path)), f"config {path}"
    if not isinstance(data, dict):
        raise InputError(f"{where} holds no mapping")
    for name, text in (overrides or {}).items():
        override(data, name, text)
    return parse_config(data, where)


def parse_config(data: Mapping[str, Any], where: str) -> TrainConfig:
    """A run out of plain data.

    Raises:
        InputError: as `read_config`.
    """
    found = dict(data)
    if "data" in found:
        found["data"] = read_data(data["data"])
    if "stages" in found:
        if not isinstance(stages := found["stages"], list):
            raise InputError(f"stages must be a list of stages, got {shown(stages)}")
        found["stages"] = tuple(_stage(x, i, data.get("data")) for i, x in enumerate(stages))
    if isinstance(found.get("init"), str) and found["init"]:
        found["model"] = _model_of(found["init"], found.get("model"))
    elif isinstance(found.get("model"), Mapping):
        own = {name: x for name, x in found["model"].items() if name in options()}
        rest = {name: x for name, x in found["model"].items() if name not in own}
        found["model"] = {"options": own, **rest} if own else rest
    return from_plain(TrainConfig, found, where)


def _stage(value: Any, index: int, common: Any) -> StageConfig:
    """A stage, whose data is what differs from that of the run, unless it names another kind."""
    where = f"stages[{index}]"
    if isinstance(value, Mapping) and value.get("data") is not None:
        own = value["data"]
        both = isinstance(own, Mapping) and isinstance(common, Mapping)
        if both and own.get("kind", common.get("kind")) == common.get("kind"):
            own = {**common, **own}
        value = {**value, "data": read_data(own, f"{where}.data")}
    return from_plain(StageConfig, value, where)


def _model_of(init: str, changes: Any) -> ModelConfig:
    """The config of the model that training starts from, with changes."""
    from rwkvx.checkpoint.formats import detect
    from rwkvx.checkpoint.load import find_model

    if changes is not None and not isinstance(changes, Mapping):
        raise InputError(f"model holds no mapping: {shown(changes)}")
    path = find_model(init)
    return detect(path).read(path, changes or {}, True).config


def override(data: dict[str, Any], name: str, text: str) -> None:
    """Set one field by dotted name to a value in YAML syntax; a number picks from a list.

    Raises:
        InputError: there is no such place, or the text is no YAML.
    """
    *parents, last = name.split(".")
    inner: Any = data
    for key in parents:
        if isinstance(inner, list):
            inner = inner[int(key)] if key.isdigit() and int(key) < len(inner) else None
        else:
            inner = inner.setdefault(key, {})
        if not isinstance(inner, dict | list):
            raise InputError(f"cannot set {name}: {key} is no mapping")
    value = parse_yaml(text, f"the value of {name}")
    if isinstance(inner, dict):
        inner[last] = value
    elif last.isdigit() and int(last) < len(inner):
        inner[int(last)] = value
    else:
        raise InputError(f"cannot set {name}: {last} is no place in the list")


def field_names(kind: type = TrainConfig, prefix: str = "") -> list[str]:
    """All fields by dotted name: what a command line can override."""
    names = []
    hints = get_type_hints(kind)
    for f in fields(kind):
        if is_dataclass(hints[f.name]) and hints[f.name] is not Data:
            names += field_names(hints[f.name], f"{prefix}{f.name}.")
        else:
            names.append(prefix + f.name)
    return names
