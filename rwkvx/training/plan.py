"""What a run will take, before it is started: parameters, memory, arithmetic, time, disk.

Axes: C width, N head size, T time.
"""

import os
import time
from collections import Counter
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from rwkvx.checkpoint.checkpoint import parameter_shapes
from rwkvx.config import ModelConfig
from rwkvx.costs import mixing_flops
from rwkvx.errors import InputError
from rwkvx.init import init_weights
from rwkvx.model import Model
from rwkvx.training.batches import Batch
from rwkvx.training.config import StageConfig, TrainConfig
from rwkvx.training.forward import Objective

__all__ = [
    "Plan",
    "Sample",
    "check_memory",
    "fits",
    "flops_per_token",
    "make_plan",
    "measure",
    "product_speed",
    "report",
]

FLOAT = 4  # bytes: weights, gradients and moments are float32 in every precision
SAMPLE_TOKENS = 512
# Rows and columns of the product that measures the speed of a device; a GPU needs more.
PRODUCT = {"cpu": 1024, "cuda": 8192}


class Plan(NamedTuple):
    """What follows from the config alone.

    Attributes:
        parameters: count by part of the model.
        memory: bytes by use, activations not among them.
        tokens: of the whole run; flops: of all its products, forward and backward.
        disk: bytes of a checkpoint and of the model.
    """

    parameters: dict[str, int]
    memory: dict[str, int]
    tokens: int
    flops: float
    disk: dict[str, int]


class Sample(NamedTuple):
    """What a piece of a step took on this machine.

    Attributes:
        tokens: that were read; seconds: forward and backward; saved: bytes kept for the backward.
        product: floating-point operations a second of a large product, in the run's precision.
    """

    tokens: int
    seconds: float
    saved: int
    product: float


def make_plan(config: TrainConfig) -> Plan:
    """Count what a run takes; nothing is built."""
    model = config.model
    parts = _parameters(model)
    count, copies = sum(parts.values()), 2 + bool(config.average)
    memory = {
        "weights": count * FLOAT,
        "gradients": count * FLOAT,
        "optimiser": 2 * count * FLOAT,
    }
    if config.average:
        memory["average"] = count * FLOAT
    return Plan(
        parts,
        memory,
        config.tokens_until(config.total_steps),
        sum(flops_per_token(model, stage) * tokens for stage, tokens in _tokens(config)),
        {"checkpoint": (copies + 1) * count * FLOAT, "model": count * FLOAT},
    )


def check_memory(config: TrainConfig) -> None:
    """Refuse what this machine has no memory for, before it is tried.

    Raises:
        InputError: weights and moments, or the input of each block, exceed it.
    """
    there = _memory(config.device)
    needed = sum(make_plan(config).memory.values())
    if needed > there:
        raise InputError(
            f"training this model takes {_size(needed)} for weights, gradients and moments; there "
            f"is memory of {_size(there)}"
        )
    for number, stage in enumerate(config.stages):
        rows = stage.batch * config.accumulate
        # Of each block at least its input is kept; ids and weights of a step are made at once.
        block_inputs = stage.batch * config.model.width * len(config.model.pattern) * FLOAT
        least = stage.length * (block_inputs + rows * 32)
        if least > there:
            raise InputError(
                f"stages[{number}] reads {rows:,} sequences of {stage.length:,} tokens a step, "
                f"which takes {_size(least)} at least; there is memory of {_size(there)}"
            )


def measure(config: TrainConfig) -> Sample:
    """Forward and backward of one short row, on random tokens, and a large product."""
    if config.threads:
        torch.set_num_threads(config.threads)
    stage = config.stages[0]
    length = min(SAMPLE_TOKENS, max(s.length for s in config.stages))
    model = init_weights(Model(config.model), 0).to(config.device)
    model.gradient_checkpointing = config.gradient_checkpointing
    model.set_topk(stage.topk or config.model.topk)
    ids = torch.randint(config.model.vocab_size, (1, length + 1))
    none = torch.zeros(1, length, dtype=torch.bool)
    weights = torch.full((1, length), 1 / length)
    batch = Batch(ids[:, :-1], ids[:, 1:], weights, none, none.numpy())
    batch = batch.to(config.device)
    saved: list[int] = []

    def keep(x: Tensor) -> Tensor:
        saved.append(x.untyped_storage().nbytes())
        return x

    kind = torch.device(config.device).type
    half = config.precision == "bf16"
    for _ in range(2):  # the first one compiles
        saved.clear()
        began = time.perf_counter()
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
        with hooks, torch.autocast(kind, dtype=torch.bfloat16, enabled=half):
            loss, _ = Objective(model)(batch)
        loss.backward()
        loss.item()
        seconds = time.perf_counter() - began
    return Sample(length, seconds, sum(saved), product_speed(config.device, config.precision))


def report(config: TrainConfig, plan: Plan, sample: Sample | None) -> list[tuple[str, str]]:
    """Rows of a table."""
    count = sum(plan.parameters.values())
    rows = [("run", f"{config.name}, in {config.folder}")]
    rows += [("parameters", f"{count:,}")]
    rows += [(f"  {name}", f"{number:,}") for name, number in plan.parameters.items()]
    memory = dict(plan.memory)
    if sample is not None:
        largest = max(stage.batch * stage.length for stage in config.stages)
        memory["activations"] = round(sample.saved / sample.tokens * largest)
    rows += [("memory", _size(sum(memory.values())))]
    rows += [(f"  {name}", _size(number)) for name, number in memory.items()]
    rows += [("tokens", f"{plan.tokens:,} in {config.total_steps:,} steps")]
    rows += [("arithmetic", f"{plan.flops / max(plan.tokens, 1):.3g} FLOPs a token")]
    if sample is None:
        rows.append(("time", "not measured: the model does not fit this machine"))
    else:
        rate = sample.tokens / sample.seconds
        share = plan.flops / max(plan.tokens, 1) * rate / sample.product
        rows += [
            ("time", f"{_hours(plan.tokens / rate)} at {rate:,.0f} tokens a second"),
            ("", f"(measured on {sample.tokens} tokens; larger batches are quicker)"),
            ("products", f"{share:.0%} of this machine's {sample.product / 1e9:,.0f} GFLOP/s"),
        ]
    rows += [("disk", _size(2 * plan.disk["checkpoint"] + plan.disk["model"]))]
    rows += [(f"  {name}", _size(number)) for name, number in plan.disk.items()]
    return rows


def fits(config: TrainConfig, plan: Plan) -> bool:
    """Whether a sample can be measured here."""
    return sum(plan.memory.values()) < _memory(config.device) / 2


def _parameters(config: ModelConfig) -> dict[str, int]:
    parts: Counter[str] = Counter()
    for name, shape in parameter_shapes(config).items():
        group, _, rest = name.partition(".")
        if group == "blocks":
            group = f"{config.pattern[int(rest.partition('.')[0])]} blocks"
        elif group.startswith("ln"):
            group = "norms"
        parts[{"emb": "embedding"}.get(group, group)] += shape.numel()
    return dict(parts)


def flops_per_token(config: ModelConfig, stage: StageConfig) -> float:
    """Of all products for one token: each is made once forward and twice backward."""
    total = 0.0
    for name, shape in parameter_shapes(config).items():
        if len(shape) == 2 and not name.startswith("emb"):
            total += 2 * shape.numel()
    own = replace(config, topk=stage.topk or config.topk)
    return 3 * (total + sum(mixing_flops(own, 0, stage.length).values()) / stage.length)


def _tokens(config: TrainConfig) -> list[tuple[StageConfig, int]]:
    """Tokens that each stage reads."""
    ends = [config.stage_start(i + 1) for i in range(len(config.stages) - 1)]
    bounds = [0, *(min(end, config.total_steps) for end in ends), config.total_steps]
    counts = [config.tokens_until(step) for step in bounds]
    return [(s, b - a) for s, a, b in zip(config.stages, counts, counts[1:], strict=False)]


def product_speed(device: str, precision: str) -> float:
    """Floating-point operations a second of a large product, the best of some."""
    side = PRODUCT.get(torch.device(device).type, PRODUCT["cuda"])
    a = torch.randn(side, side, device=device)
    a = a.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    best = float("inf")
    for _ in range(8):
        began = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


def _memory(device: str) -> int:
    """Bytes of the machine or of the GPU."""
    if device.startswith("cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def _hours(seconds: float) -> str:
    if seconds < 90 * 60:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:,.1f} hours"
