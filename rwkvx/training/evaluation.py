"""What a model scores on data that training does not show it."""

from itertools import pairwise

import torch
from torch.distributed.fsdp import FSDPModule

from rwkvx.data.sources import Source
from rwkvx.training.batches import Batch, evaluation_batch
from rwkvx.training.config import StageConfig, TrainConfig
from rwkvx.training.forward import Objective, Scores
from rwkvx.training.world import World


@torch.no_grad()
def evaluate(
    objective: Objective, source: Source, config: TrainConfig, stage: StageConfig, world: World
) -> dict[str, float]:
    """Loss of each evaluation of the source, over all tokens and by their position in the sequence;
    share of rows whose answers are all right, if any are asked for."""
    model = objective.model
    model.set_topk(stage.topk or config.model.topk)
    model.recurrent_pieces = 1
    metrics: dict[str, float] = {}
    for name, part in source.evaluations().items():
        found = evaluate_source(objective, part, config, stage, world)
        metrics |= {f"{kind}/{name}{rest}": x for (kind, rest), x in found.items()}
    if isinstance(objective, FSDPModule):
        objective.reshard()  # what was gathered would outlive the next change of the weights
    return metrics


def evaluate_source(
    objective: Objective, source: Source, config: TrainConfig, stage: StageConfig, world: World
) -> dict[tuple[str, str], float]:
    """Means by kind ("loss", "accuracy", "position") and, for the last, positions.

    Every process reads some of the batches; all of them make as many calls.
    """
    batches, buckets = config.eval_batches, _buckets(stage.length)
    loss, right, asked, width = 0.0, 0, 0, 0
    found: list[tuple[Batch, Scores]] = []
    sums, counts = torch.zeros(len(buckets)), torch.zeros(len(buckets))
    rank, groups, _ = world.data
    for first in range(0, batches, groups):
        index = min(first + rank, batches - 1)
        batch = evaluation_batch(source, config, stage, index)
        width = batch.inputs.shape[1]  # a short text has shorter rows
        scores = objective(batch.to(str(objective.model.device)), scoring=True)
        if first + rank < batches and world.counts:
            found.append((batch, scores))
    for batch, scores in found:  # when the device has all of its work
        losses, guessed = scores.losses.cpu(), scores.right.cpu()
        loss += float((losses * batch.weights).sum()) / batches
        if batch.answers.any():
            right += int((guessed | ~batch.answers).all(dim=1).sum())
            asked += len(guessed)
        for i, bucket in enumerate(buckets):
            used = batch.weights[:, bucket] > 0
            sums[i] += losses[:, bucket][used].sum()
            counts[i] += used.sum()
    loss, right_sum, asked_sum = world.all_sum(loss, right, asked)
    means = {("loss", ""): loss}
    totals = world.all_sum(*sums.tolist(), *counts.tolist())
    if asked_sum:
        means["accuracy", ""] = right_sum / asked_sum
    else:
        for i, bucket in enumerate(buckets):
            if count := totals[len(buckets) + i]:
                place = f"/{bucket.start}-{min(bucket.stop, width)}"
                means["position", place] = totals[i] / count
    return means


def _buckets(length: int) -> list[slice]:
    """Positions from 0, in parts each as long as all before it: 0-64, 64-128, 128-256, ..."""
    bounds = [0, 64]
    while bounds[-1] < length:
        bounds.append(2 * bounds[-1])
    return [slice(a, min(b, length)) for a, b in pairwise(bounds)]


def total_loss(metrics: dict[str, float]) -> float:
    """What `keep: best` goes by: the sum of all losses, those by position not among them."""
    return sum(value for name, value in metrics.items() if name.startswith("loss/"))


def as_text(metrics: dict[str, float]) -> str:
    """The losses and shares in one line."""
    shown = {k: x for k, x in metrics.items() if not k.startswith("position/")}
    return ", ".join(f"{name} {value:.4f}" for name, value in shown.items())
