"""The training loop.

Axes: B batch, T time, C width.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any, cast

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from rwkvx.checkpoint import load
from rwkvx.checkpoint.checkpoint import check_vocabulary
from rwkvx.checkpoint.folder import save_folder
from rwkvx.checkpoint.load import usable_device
from rwkvx.checkpoint.shards import read_weights
from rwkvx.data.sources import Data, Reader, Source
from rwkvx.errors import InputError, is_out_of_memory
from rwkvx.files import replacing_folder
from rwkvx.init import init_weights
from rwkvx.model import Model
from rwkvx.state import ModelState
from rwkvx.tokenizers.file import fingerprint, read_tokenizer
from rwkvx.training import checkpoint
from rwkvx.training.batches import step_batch
from rwkvx.training.checkpoint import Progress, Running
from rwkvx.training.config import StageConfig, TrainConfig
from rwkvx.training.evaluation import evaluate
from rwkvx.training.events import Curves
from rwkvx.training.facts import facts
from rwkvx.training.forward import hidden_states, weighted_loss
from rwkvx.training.identity import differences, identity
from rwkvx.training.optim import build_optimizer, learning_rate, set_learning_rate
from rwkvx.training.passing import PASSING, carried_state, initial_state
from rwkvx.training.plan import check_memory
from rwkvx.training.progress import ProgressLine
from rwkvx.training.run_folder import RunFolder
from rwkvx.training.stopping import Stopped, StopRequest, stop_requests


class Trainer:
    """One run: `Trainer(config).run()` returns the trained model, also saved in the run's folder.

    Raises:
        InputError: a device, data, weights or sizes that cannot be.
    """

    def __init__(self, config: TrainConfig, data: str | None = None) -> None:
        if config.threads:
            torch.set_num_threads(config.threads)
        self.config, self.folder = config, RunFolder(config.folder)
        check_memory(config)
        self.model = self._starting_model()
        self.model.gradient_checkpointing = config.gradient_checkpointing
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.average: AveragedModel | None = None
        if config.average:
            averaging = get_ema_multi_avg_fn(config.average)
            self.average = AveragedModel(self.model, multi_avg_fn=averaging)
        if config.compile:  # after the average, which is a copy
            for block in self.model.blocks:
                block.compile()
        self.carried: ModelState | None = None
        self.progress = Progress({}, config.total_steps)
        self._reader, self._sources = Reader(self.model.tokenizer, data), dict[Data, Source]()
        for number, stage in enumerate(config.stages):  # what is wrong with any is said now
            step_batch(self.source(stage), config, config.stage_start(number))

    def _starting_model(self) -> Model:
        config = self.config
        if config.init:
            model = load(config.init, config.device, **config.model.to_dict())
        else:
            device = usable_device(config.device)
            model = init_weights(Model(config.model), config.seed).to(device)
        if config.tokenizer:
            model.use_tokenizer(read_tokenizer(config.tokenizer))
        check_vocabulary(model.config, "model", model.tokenizer)
        return model.train()

    @property
    def step(self) -> int:
        """Steps done."""
        return self.progress.step

    @property
    def result(self) -> Model:
        """What is evaluated and becomes the model: the averaged weights, if there are any."""
        return self.model if self.average is None else cast(Model, self.average.module)

    def source(self, stage: StageConfig) -> Source:
        """Where a stage's rows come from."""
        data = self.config.data_of(stage)
        if data not in self._sources:
            self._sources[data] = data.open(self._reader)
        return self._sources[data]

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All that the weights depend on."""
        sources = {stage: self.source(stage) for stage in self.config.stages}
        return identity(self.config, sources, fingerprint(self.model.tokenizer))

    # ------------------------------------------------------------- a run

    def run(self, anyway: bool = False) -> Model:
        """Train to the end, from the newest checkpoint of the folder if there is one.

        Args:
            anyway: go on with a run that was another one; the change is recorded.

        Raises:
            InputError: the folder belongs to another run, or its checkpoint is damaged.
            Stopped: a signal came; all is saved.
        """
        with self.folder.owned(), stop_requests() as request:
            self.resume(anyway)
            self.folder.write_config(self.config.to_dict())
            with _explained(self.config):
                self._train(request)
            if request.signal and self.step < self.config.total_steps:
                done = f"step {self.step} of {self.config.total_steps}"
                raise Stopped(f"stopped at {done}, saved: the same command goes on", request.signal)
            return self._finished()

    def resume(self, anyway: bool = False) -> None:
        """Go on from the newest checkpoint, or be at the start; see `run`."""
        config, newest = self.config, self.folder.newest()
        if newest is None:
            self.progress = Progress(self.identity, config.total_steps)
            target = self.folder.model(config.name, config.total_steps)
            if target.exists():
                raise InputError(f"{target} exists already: choose another --out or --name")
            return
        self.folder.verify(newest)
        progress = checkpoint.read_progress(newest)
        totals = (progress.total, config.total_steps)
        changed = differences(progress.identity, self.identity, progress.step, totals)
        if changed and not anyway:
            more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
            raise InputError(
                f"{config.folder} holds a run whose {changed[0]}{more}: choose another --out, or "
                "--resume-anyway to go on with the change"
            )
        if totals[1] > totals[0]:
            changed.append(f"steps is {totals[0]}, now {totals[1]}")
        self.carried = checkpoint.read(newest, self._running, progress)
        if changed:
            progress.changes.append({"step": progress.step, "changed": changed})
        progress.identity, progress.total = self.identity, config.total_steps
        self.progress = progress
        self.folder.forget_after(progress.step)

    def save(self) -> None:
        """Write a checkpoint that an equal run goes on from."""
        self.folder.write_checkpoint(
            self.step, lambda folder: checkpoint.write(folder, self._running, self.progress)
        )

    @property
    def _running(self) -> Running:
        return Running(self.model, self.optimizer, self.average, self.carried)

    def _train(self, request: StopRequest) -> None:
        config, total = self.config, self.config.total_steps
        curves = Curves(self.folder)
        tokens, done = config.tokens_until(total), config.tokens_until(self.step)
        with ProgressLine(tokens, done, total) as line:
            while self.step < total and not request.signal:
                began, skipped = time.perf_counter(), self.progress.skipped
                metrics = self.train_step()
                count = config.tokens_until(self.step) - config.tokens_until(self.step - 1)
                metrics["tokens_per_second"] = count / (time.perf_counter() - began)
                curves.add(self.step, metrics)
                line.step(self.step, count, metrics["loss/train"])
                if self.progress.skipped > skipped:
                    line.say(f"step {self.step}: no update, the loss or a gradient is not finite")
                last = self.step == total
                if last or self.step % config.eval_every == 0:
                    metrics = self.evaluate()
                    text = ", ".join(f"{k} {v:.4f}" for k, v in metrics.items())
                    line.say(f"step {self.step}: {text}")
                    curves.add(self.step, metrics)
                    self._keep(metrics)
                if last or request.signal or self.step % config.save_every == 0:
                    self.save()

    def _keep(self, metrics: dict[str, float]) -> None:
        """Write the model if it is to be the best of the last stage, and is the best so far."""
        config, progress = self.config, self.progress
        last = config.stage(config.total_steps - 1)  # `steps` may leave out the last that is named
        if config.keep == "last" or config.stage(self.step - 1) is not last:
            return
        loss = sum(value for name, value in metrics.items() if name.startswith("loss/"))
        if progress.best is None or loss < progress.best:
            progress.best, progress.best_step = loss, self.step
            with replacing_folder(self.folder.best(self.step)) as temporary:
                save_folder(self.result, temporary)

    def _finished(self) -> Model:
        """Write the model and its results, unless they are there; the model."""
        config, progress, model = self.config, self.progress, self.result
        model.set_topk(model.config.topk)
        model.recurrent_pieces = 1
        target = self.folder.model(config.name, self.step)
        if target.exists():
            model.load_state_dict(read_weights(target))
            return model.eval()
        if config.keep == "best":
            model.load_state_dict(read_weights(self.folder.best(progress.best_step)))
        result = {
            **facts(),
            "steps": self.step,
            "weights_of_step": progress.best_step if config.keep == "best" else self.step,
            "tokens": config.tokens_until(self.step),
            "skipped_steps": progress.skipped,
            "changes": progress.changes,
            "evaluation": self.evaluate(),
            "config": config.to_dict(),
        }
        self.folder.add_result(target, result)
        with replacing_folder(target) as temporary:
            save_folder(model, temporary)
        return model.eval()

    # ------------------------------------------------------------- a step

    def train_step(self) -> dict[str, float]:
        """One optimiser step: its loss, the norm of its gradient, its learning rate.

        A step whose loss or gradient is not finite leaves the weights as they are.

        Raises:
            InputError: too many of those, one after the other.
        """
        config, stage, progress = self.config, self.config.stage(self.step), self.progress
        self.model.set_topk(stage.topk or self.model.config.topk)
        self.model.recurrent_pieces = stage.pieces
        rate = learning_rate(self.step, config.total_steps, config.optimizer)
        set_learning_rate(self.optimizer, rate)
        whole, total, carried = step_batch(self.source(stage), config, self.step), 0.0, None
        for micro in range(config.accumulate):
            batch = whole.rows(micro * stage.batch, (micro + 1) * stage.batch).to(config.device)
            seed = (config.seed, PASSING, self.step, micro)
            state = initial_state(self.model, self.carried, stage, batch, seed)
            with self._autocast():
                hidden, final = hidden_states(self.model, batch, state)
                loss = weighted_loss(self.model, hidden, batch)
            loss.backward()
            total += loss.item()
            carried = carried_state(final, batch)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if math.isfinite(total) and bool(norm.isfinite()):
            torch.nn.utils.clip_grads_with_norm_(parameters, config.optimizer.clip, norm)
            self.optimizer.step()
            if self.average is not None:
                self.average.update_parameters(self.model)
            self.carried, progress.skipped_in_a_row = carried, 0
        else:
            self._skip(total)
        self.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        return {"loss/train": total, "gradient_norm": norm.item(), "learning_rate": rate}

    def _skip(self, loss: float) -> None:
        progress, config = self.progress, self.config
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        if progress.skipped_in_a_row > config.most_skipped:
            culprit = _not_finite(self.model) or f"the loss ({loss})"
            raise InputError(
                f"{culprit} is not finite at step {self.step + 1}, the {config.most_skipped} steps "
                "before had no update either: lower optimizer.lr or raise optimizer.warmup; the "
                f"last checkpoint in {config.folder} is from before"
            )

    def evaluate(self) -> dict[str, float]:
        """Loss and, for data with answers, the share of rows answered exactly, on other data."""
        stage = self.config.stage(max(0, self.step - 1))
        # Compiled blocks would be compiled once more, for no gradients.
        with self._autocast(), torch.compiler.set_stance("force_eager"):
            return evaluate(self.result, self.source(stage), self.config, stage)

    def _autocast(self) -> Any:
        if self.config.precision == "float32":
            return nullcontext()
        return torch.autocast(torch.device(self.config.device).type, dtype=torch.bfloat16)


@contextmanager
def _explained(config: TrainConfig) -> Iterator[None]:
    """Memory that ran out is something that a user can mend."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(
            "memory ran out: lower batch and raise accumulate, or set gradient_checkpointing; "
            f"the last checkpoint in {config.folder} is from before"
        ) from error


def _not_finite(model: Model) -> str | None:
    """The first weight that is not finite, else the first gradient, in words."""
    for name, x in model.named_parameters():
        if not x.isfinite().all():
            return f"the weight {name}"
    for name, x in model.named_parameters():
        if x.grad is not None and not x.grad.isfinite().all():
            return f"the gradient of {name}"
    return None
