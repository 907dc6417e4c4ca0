"""The training loop.

Axes: B batch, T time, V vocabulary.
"""

import math
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from rwkvx.checkpoint import load
from rwkvx.checkpoint.checkpoint import check_vocabulary
from rwkvx.checkpoint.folder import save_folder
from rwkvx.checkpoint.load import usable_device
from rwkvx.checkpoint.shards import read_weights
from rwkvx.data.sources import Data, Reader, Source
from rwkvx.errors import InputError
from rwkvx.init import init_weights
from rwkvx.model import Model
from rwkvx.state import ModelState
from rwkvx.tokenizers.file import read_tokenizer
from rwkvx.training.batches import Batch, evaluation_batch, step_batch
from rwkvx.training.config import StageConfig, TrainConfig
from rwkvx.training.events import Events
from rwkvx.training.optim import build_optimizer, learning_rate, set_learning_rate
from rwkvx.training.passing import PASSING, carried_state, initial_state
from rwkvx.training.resume import load_checkpoint, save_checkpoint
from rwkvx_kernels.linear import linear_cross_entropy


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
        if config.tokenizer:
            self.model.use_tokenizer(read_tokenizer(config.tokenizer))
            check_vocabulary(self.model.config, str(config.tokenizer), self.model.tokenizer)
        self.model.gradient_checkpointing = config.gradient_checkpointing
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.reader, self._sources = Reader(self.model.tokenizer, data), dict[Data, Source]()
        for step in range(config.total_steps):  # what is wrong with any stage's data is said now
            if config.stage_at(step)[1] == 0:
                step_batch(self.source(config.stage(step)), config, step)
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
        with tqdm(total=tokens, unit="tok", unit_scale=True, file=sys.stderr) as bar:
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
        whole, total = step_batch(self.source(stage), config, self.step), 0.0
        for micro in range(config.accumulate):
            batch = whole.rows(micro * stage.batch, (micro + 1) * stage.batch).to(config.device)
            seed = (config.seed, PASSING, self.step, micro)
            loss, final = self._loss(batch, initial_state(self.carried, stage, batch, seed))
            loss.backward()
            total += loss.item()
            if not math.isfinite(total):
                raise InputError(
                    f"the loss of step {self.step + 1} is {total}: lower optimizer.lr or raise "
                    f"optimizer.warmup; the last checkpoint in {config.folder} is from before"
                )
            self.carried = carried_state(final, batch)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.optimizer.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.step += 1
        return total

    def source(self, stage: StageConfig) -> Source:
        """Where a stage's rows come from, opened when the first stage that reads it begins."""
        data = self.config.data_of(stage)
        if data not in self._sources:
            self._sources[data] = data.open(self.reader)
        return self._sources[data]

    def evaluate(self) -> dict[str, float]:
        """Loss and, for data with answers, the share of rows answered exactly, on other data."""
        stage = self.config.stage(max(0, self.step - 1))
        metrics = {}
        for name, part in self.source(stage).evaluations().items():
            loss, accuracy = self._evaluate(part, stage)
            metrics[f"loss/{name}"] = loss
            if accuracy is not None:
                metrics[f"accuracy/{name}"] = accuracy
        return metrics

    @torch.no_grad()
    def _evaluate(self, source: Source, stage: StageConfig) -> tuple[float, float | None]:
        losses, right, asked, model = 0.0, 0, 0, self.result
        model.set_topk(stage.topk or self.config.model.topk)
        model.recurrent_pieces = 1
        for index in range(self.config.eval_batches):
            batch = evaluation_batch(source, self.config, stage, index).to(self.config.device)
            with self._autocast():
                hidden, _ = self._hidden(model, batch, None)
                losses += self._head_loss(model, hidden, batch).item()
                if batch.answers.any():
                    guessed = model.head(hidden[batch.answers]).argmax(-1)
                    wrong = torch.zeros_like(batch.answers)
                    wrong[batch.answers] = guessed != batch.targets[batch.answers]
                    right += int((~wrong.any(dim=1)).sum())
                    asked += len(wrong)
        return losses / self.config.eval_batches, right / asked if asked else None

    def _loss(self, batch: Batch, state: ModelState | None) -> tuple[Tensor, ModelState]:
        with self._autocast():
            hidden, final = self._hidden(self.model, batch, state)
            return self._head_loss(self.model, hidden, batch), final

    def _hidden(
        self, model: Model, batch: Batch, state: ModelState | None
    ) -> tuple[Tensor, ModelState]:
        """[B, T, C] that the head reads; documents inside of rows are read as packed sequences."""
        offsets = batch.offsets
        ids = batch.inputs if offsets is None else batch.inputs.reshape(1, -1)
        hidden, final = model(ids, state, logits="hidden", cu_seqlens=offsets, keep_cache=False)
        return hidden.view(*batch.inputs.shape, -1), final

    def _head_loss(self, model: Model, hidden: Tensor, batch: Batch) -> Tensor:
        flat = (hidden.flatten(0, 1), model.head.weight, batch.targets.flatten())
        return linear_cross_entropy(*flat, batch.weights.flatten())

    def _autocast(self) -> Any:
        if self.config.precision == "float32":
            return nullcontext()
        return torch.autocast(torch.device(self.config.device).type, dtype=torch.bfloat16)


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
