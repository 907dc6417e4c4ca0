"""The training loop.

Axes: B batch, T time, V vocabulary.
"""

import math
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from rwkvx.checkpoint import load
from rwkvx.checkpoint.folder import save_folder
from rwkvx.checkpoint.load import usable_device
from rwkvx.checkpoint.shards import read_weights
from rwkvx.errors import InputError
from rwkvx.init import init_weights
from rwkvx.model import Model
from rwkvx.progress import progress
from rwkvx.state import ModelState, Rwkv7State, map_tensors
from rwkvx.training.config import StageConfig, TrainConfig
from rwkvx.training.data import Batch, Source, build_source
from rwkvx.training.events import Events
from rwkvx.training.optim import build_optimizer, learning_rate, set_learning_rate
from rwkvx.training.resume import load_checkpoint, save_checkpoint
from rwkvx_kernels.linear import linear_cross_entropy

# First number of a data seed: training and evaluation never share a sample.
TRAINING, EVALUATION, CARRYING = 0, 1, 2


class Trainer:
    """One run: `Trainer(config).run()` returns the trained model, also saved in config.folder."""

    def __init__(self, config: TrainConfig, data: str | None = None) -> None:
        if config.threads:
            torch.set_num_threads(config.threads)
        self.config = config
        if config.init:
            self.model = load(config.init, config.device, **config.model.to_dict())
        else:
            device = usable_device(config.device)
            self.model = init_weights(Model(config.model), config.seed).to(device)
        self.model.gradient_checkpointing = config.gradient_checkpointing
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.source: Source = build_source(config.data, self.model.tokenizer, data)
        self.average = None
        if config.average:
            averaging = get_ema_multi_avg_fn(config.average)
            self.average = AveragedModel(self.model, multi_avg_fn=averaging)
        self.step, self.carried, self.best = load_checkpoint(
            config.folder, self.model, self.average, self.optimizer, config
        )

    @property
    def result(self) -> Model:
        """What is evaluated and becomes the model: the averaged weights, if there are any."""
        return self.model if self.average is None else cast(Model, self.average.module)

    def run(self) -> Model:
        """Train to the end, with a progress bar, TensorBoard events, evaluations, checkpoints."""
        config, total = self.config, self.config.total_steps
        writer = _events(config.folder / "tensorboard")
        started = self.step
        tokens = sum(_tokens(config, s) for s in range(total))
        with progress(tokens) as bar:
            bar.update(sum(_tokens(config, s) for s in range(started)))
            while self.step < total:
                loss = self.train_step()
                bar.set_postfix(step=f"{self.step}/{total}", loss=f"{loss:.4f}", refresh=False)
                bar.update(_tokens(config, self.step - 1))
                if writer is not None:
                    writer.add_scalar("loss/train", loss, self.step)
                last = self.step == total
                if last or self.step % config.eval_every == 0:
                    metrics = self.evaluate()
                    text = ", ".join(f"{k} {v:.4f}" for k, v in metrics.items())
                    bar.write(f"step {self.step}: {text}", file=sys.stderr)
                    if writer is not None:
                        for name, value in metrics.items():
                            writer.add_scalar(name, value, self.step)
                    self._keep(metrics)
                if last or self.step % config.save_every == 0:
                    self.save()
        model = self.result
        model.set_topk(model.config.topk)
        model.recurrent_pieces = 1
        if config.keep == "best":
            model.load_state_dict(read_weights(config.folder / "model"))
        else:
            save_folder(model, config.folder / "model")
        return model

    def _keep(self, metrics: dict[str, float]) -> None:
        """Write the model if it is to be the best of the last stage, and is the best so far."""
        config = self.config
        last = config.stage(config.total_steps - 1)  # `steps` may leave out the last that is named
        if config.keep == "last" or config.stage(self.step - 1) is not last:
            return
        loss = sum(value for name, value in metrics.items() if name.startswith("loss/"))
        if self.best is None or loss < self.best:
            self.best = loss
            save_folder(self.result, config.folder / "model")

    def save(self) -> None:
        """Write a checkpoint that an equal run goes on from."""
        running = (self.model, self.average, self.optimizer, self.carried, self.best)
        save_checkpoint(self.config.folder, self.step, *running, self.config)

    def train_step(self) -> float:
        """One optimiser step; returns its loss."""
        config, stage = self.config, self.config.stage(self.step)
        self.model.set_topk(stage.topk or self.model.config.topk)
        self.model.recurrent_pieces = stage.pieces
        rate = learning_rate(self.step, config.total_steps, config.optimizer)
        set_learning_rate(self.optimizer, rate)
        total = 0.0
        for micro in range(config.accumulate):
            seed = (config.seed, TRAINING, self.step, micro)
            batch = self.source.batch(stage, seed)
            state = self._initial_state(stage, micro)
            loss, final = self._loss(batch, state)
            (loss / config.accumulate).backward()
            total += loss.item() / config.accumulate
            if not math.isfinite(total):
                raise InputError(
                    f"the loss of step {self.step + 1} is {total}: lower optimizer.lr or raise "
                    f"optimizer.warmup; the last checkpoint in {config.folder} is from before"
                )
            self.carried = final.recurrent()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.optimizer.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.step += 1
        return total

    def evaluate(self) -> dict[str, float]:
        """Loss and, for tasks with answers, the share of samples answered exactly, on new data."""
        stage = self.config.stage(max(0, self.step - 1))
        metrics = {}
        for name, part in self.source.evaluations(stage).items():
            loss, accuracy = self._evaluate(part)
            metrics[f"loss/{name}"] = loss
            if accuracy is not None:
                metrics[f"accuracy/{name}"] = accuracy
        return metrics

    @torch.no_grad()
    def _evaluate(self, stage: StageConfig) -> tuple[float, float | None]:
        losses, right, asked, model = 0.0, 0, 0, self.result
        model.set_topk(stage.topk or self.config.model.topk)
        model.recurrent_pieces = 1
        for index in range(self.config.eval_batches):
            batch = self._to_device(self.source.batch(stage, (self.config.seed, EVALUATION, index)))
            with self._autocast():
                logits, _ = model(batch.inputs, keep_cache=False)
            losses += _weighted_loss(logits, batch).item()
            if batch.answers.any():
                wrong = (logits.argmax(-1) != batch.targets) & batch.answers
                right += int((~wrong.any(dim=1)).sum())
                asked += len(wrong)
        return losses / self.config.eval_batches, right / asked if asked else None

    def _loss(self, batch: Batch, state: ModelState | None) -> tuple[Tensor, ModelState]:
        batch = self._to_device(batch)
        with self._autocast():
            hidden, final = self.model(batch.inputs, state, logits="hidden", keep_cache=False)
            flat = (hidden.flatten(0, 1), self.model.head.weight, batch.targets.flatten())
            loss = linear_cross_entropy(*flat, batch.weights.flatten())
        return loss, final

    def _initial_state(self, stage: StageConfig, micro: int) -> ModelState | None:
        """Rows of the carried recurrent states, others zero; None for all zero."""
        if self.carried is None or (stage.state_passing == 0 and stage.pieces == 1):
            return None
        seed = _generator_seed(self.config.seed, CARRYING, self.step, micro)
        generator = torch.Generator().manual_seed(seed)
        keep = torch.ones(stage.batch, stage.pieces)  # later pieces always go on from some state
        keep[:, 0] = torch.rand(stage.batch, generator=generator) < stage.state_passing
        draw = torch.rand(stage.batch, stage.pieces, generator=generator)
        blocks = []
        for block in self.carried.blocks:
            pieces = stage.pieces if isinstance(block, Rwkv7State) else 1
            rows = (draw[:, :pieces].flatten() * len(block.ffn_shift)).long().to(self.model.device)
            kept = keep[:, :pieces].flatten().to(self.model.device)

            def passed(x: Tensor, rows: Tensor = rows, kept: Tensor = kept) -> Tensor:
                return x[rows] * kept.view(-1, *[1] * (x.dim() - 1)).to(x.dtype)

            blocks.append(map_tensors(block, passed))
        return ModelState(tuple(blocks), 0)

    def _to_device(self, batch: Batch) -> Batch:
        return Batch(*(x.to(self.config.device, non_blocking=True) for x in batch))

    def _autocast(self) -> Any:
        if self.config.precision == "float32":
            return nullcontext()
        return torch.autocast(torch.device(self.config.device).type, dtype=torch.bfloat16)


def _weighted_loss(logits_BTV: Tensor, batch: Batch) -> Tensor:
    losses = F.cross_entropy(
        logits_BTV.flatten(0, 1).float(), batch.targets.flatten(), reduction="none"
    )
    return (losses * batch.weights.flatten()).sum()


def _generator_seed(*numbers: int) -> int:
    """One seed for torch out of several numbers, the same on every machine."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def _tokens(config: TrainConfig, step: int) -> int:
    stage = config.stage(step)
    return stage.length * stage.batch * config.accumulate


def _events(folder: Path) -> Events | None:
    """Where TensorBoard is installed."""
    try:
        return Events(folder)
    except ModuleNotFoundError:
        print("no TensorBoard events: `pip install rwkvx[train]` adds them", file=sys.stderr)
        return None
