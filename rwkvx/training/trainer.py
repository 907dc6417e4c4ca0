"""A run: from its newest checkpoint to its end, a step at a time.

Axes: B batch, T time, C width.
"""

import math
import shutil
import time
from contextlib import closing, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.fsdp import FSDPModule
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from rwkvx.adapters import adapter_tensors, add_adapter
from rwkvx.checkpoint import adapter, load
from rwkvx.checkpoint import folder as model_folder
from rwkvx.checkpoint.checkpoint import check_vocabulary
from rwkvx.checkpoint.load import find_model, usable_device
from rwkvx.data.sources import Data, Reader, Source
from rwkvx.errors import InputError
from rwkvx.files import write_text
from rwkvx.init import init_weights
from rwkvx.model import Model
from rwkvx.state import ModelState
from rwkvx.tokenizers.file import fingerprint, read_tokenizer
from rwkvx.training import checkpoint
from rwkvx.training.batches import Batch, check_division, own_batches, step_batch
from rwkvx.training.card import model_card
from rwkvx.training.checkpoint import Progress, Running, whole_model
from rwkvx.training.config import StageConfig, TrainConfig
from rwkvx.training.curves import Curves, Silence
from rwkvx.training.distributed import (
    distributed,
    gradients_shared,
    shard,
    sharing,
    whole,
)
from rwkvx.training.evaluation import as_text, evaluate, total_loss
from rwkvx.training.facts import facts
from rwkvx.training.forward import LongContext, Objective, alone
from rwkvx.training.identity import differences, identity
from rwkvx.training.optim import build_optimizer, learning_rate, learning_weights, set_learning_rate
from rwkvx.training.passing import PASSING, carried_state, initial_state
from rwkvx.training.plan import check_memory
from rwkvx.training.probes import passkey_probe, samples
from rwkvx.training.progress import ProgressLine, Speed
from rwkvx.training.run_folder import RunFolder
from rwkvx.training.saving import Saver
from rwkvx.training.stopping import Stopped, StopRequest, stop_requests
from rwkvx.training.trouble import explained, not_finite
from rwkvx.training.world import World

ALONE = World(0, 1)


class Trainer:
    """One run: `Trainer(config).run()` returns the trained model, also saved in the run's folder.

    Args:
        data: the data folder.
        world, device: this process among others that train the same model, and its device.

    Raises:
        InputError: a device, data, weights or sizes that cannot be.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: str | None = None,
        world: World = ALONE,
        device: str | None = None,
    ) -> None:
        if config.threads:
            torch.set_num_threads(config.threads)
        self.config, self.world = config, world
        self.folder = RunFolder(config.folder, config.keep_checkpoints)
        self.saver = Saver(self.folder, world)
        self.device, self.base = device or config.device, ""
        check_memory(config)
        check_division(config, world.size)
        self.model = self._starting_model()
        self.objective = Objective(self.model)
        self.average = self._average()
        self.model.sequence = self.result.model.sequence = sharing(world)
        some = any(stage.learn != "all" for stage in config.stages)
        self.called = distributed(self.objective, world, config.parallel, some)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.carried: ModelState | None = None
        self.progress = Progress({}, config.total_steps)
        self._reader, self._sources = Reader(self.model.tokenizer, data), dict[Data, Source]()
        for number, stage in enumerate(config.stages):  # what is wrong with any is said now
            step_batch(self.source(stage), config, config.stage_start(number))

    def _starting_model(self) -> Model:
        config = self.config
        if config.init:
            model = load(config.init, self.device, **config.model.to_dict())
        else:
            device = usable_device(self.device)
            model = init_weights(Model(config.model), config.seed).to(device)
        if config.tokenizer:
            model.use_tokenizer(read_tokenizer(config.tokenizer))
        check_vocabulary(model.config, "model", model.tokenizer)
        model.gradient_checkpointing = config.gradient_checkpointing
        if config.adapter.kind:
            self.base = adapter.fingerprint(model.state_dict())
            add_adapter(model, config.adapter, config.seed)
        return model.train()

    def _average(self) -> AveragedModel | None:
        average = None
        if self.config.average:
            averaging = get_ema_multi_avg_fn(self.config.average)
            average = AveragedModel(self.objective, multi_avg_fn=averaging)
            if self.world.size > 1 and self.config.parallel == "fsdp":
                shard(cast(Objective, average.module))
        if self.config.compile:  # after the average, which is a copy
            for block in self.model.blocks:
                block.compile()
        return average

    @property
    def step(self) -> int:
        """Steps done."""
        return self.progress.step

    @property
    def result(self) -> Objective:
        """What is evaluated and becomes the model: the averaged weights, if there are any."""
        return self.objective if self.average is None else cast(Objective, self.average.module)

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
        return identity(self.config, sources, fingerprint(self.model.tokenizer), self.base)

    # ------------------------------------------------------------- a run

    def run(self, anyway: bool = False) -> Model:
        """Train to the end, from the newest checkpoint of the folder if there is one.

        Args:
            anyway: go on with a run that was another one; the change is recorded.

        Raises:
            InputError: the folder belongs to another run, or its checkpoint is damaged.
            Stopped: a signal came; all is saved.
        """
        config, world = self.config, self.world
        with self.folder.owned() if world.first else nullcontext(), stop_requests() as request:
            world.wait()
            self.resume(anyway)
            if world.first:
                self.folder.write_config(config.to_dict())
            with explained(config), closing(self.saver):
                self._train(request)
                self.saver.wait()
            if request.signal and self.step < config.total_steps:
                done = f"step {self.step} of {config.total_steps}"
                raise Stopped(f"stopped at {done}, saved: the same command goes on", request.signal)
            self._write_model()
        return load(self.folder.model(config.name, self.step), self.device)

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
        self.carried = checkpoint.read(newest, self._running, progress, self.world)
        if changed:
            progress.changes.append({"step": progress.step, "changed": changed})
        progress.identity, progress.total = self.identity, config.total_steps
        self.progress = progress
        self.world.wait()
        if self.world.first:
            self.folder.forget_after(progress.step)

    def save(self) -> None:
        """Begin to write a checkpoint that an equal run goes on from."""
        self.saver.start(self._running, self.progress)

    @property
    def _running(self) -> Running:
        return Running(self.model, self.optimizer, self.average, self.carried)

    def _train(self, request: StopRequest) -> None:
        config, total, first = self.config, self.config.total_steps, self.world.first
        tokens, done = config.tokens_until(total), config.tokens_until(self.step)
        curves = Curves(self.folder, config) if first else Silence()
        speed = Speed(config, self.device, self.world.size)
        with ProgressLine(tokens, done, total, first) as line, closing(curves):
            while self.step < total and not request.signal:
                began, skipped = time.perf_counter(), self.progress.skipped
                metrics = self.train_step()
                count = config.tokens_until(self.step) - config.tokens_until(self.step - 1)
                metrics |= speed.of(self.step - 1, count, time.perf_counter() - began)
                curves.add(self.step, metrics)
                line.step(self.step, count, metrics["loss/train"])
                if self.progress.skipped > skipped:
                    line.say(f"step {self.step}: no update, the loss or a gradient is not finite")
                last = self.step == total
                if last or self.step % config.eval_every == 0:
                    metrics = self.evaluate()
                    line.say(f"step {self.step}: {as_text(metrics)}")
                    curves.add(self.step, metrics)
                    self._keep(metrics)
                    self._write_samples()
                request.signal = self.world.any(request.signal)
                due = self.world.any(first and speed.minutes_since_save >= config.save_minutes)
                planned = self.step % config.save_every == 0
                if last or request.signal or planned or (config.save_minutes and due):
                    self.save()
                    speed.saved()

    def _write_samples(self) -> None:
        """What the model writes now; not where every process holds a part of it."""
        model = self.result.model
        if self.config.samples and self.world.first and not isinstance(self.result, FSDPModule):
            with alone(model):
                self.folder.add_samples(self.step, samples(model, self.config))

    def _keep(self, metrics: dict[str, float]) -> None:
        """Write the model if it is to be the best of the last stage, and is the best so far."""
        config, progress = self.config, self.progress
        last = config.stage(config.total_steps - 1)  # `steps` may leave out the last that is named
        if config.keep == "last" or config.stage(self.step - 1) is not last:
            return
        loss = total_loss(metrics)
        if progress.best is None or loss < progress.best:
            progress.best, progress.best_step = loss, self.step
            progress.best_scores = metrics
            self._write_result(self.folder.best(self.step))

    def _write_result(self, folder: Path) -> None:
        """Write what was trained as it is now: a model, or an adapter; every process must ask."""
        config, model = self.config, self.result.model
        if config.adapter.kind:
            if self.world.first:
                tensors = adapter_tensors(model)
                base = str(find_model(config.init))
                found = adapter.Adapter(config.adapter, tensors, self.base, base, folder)
                adapter.write_adapter(found, folder)
            return
        checkpoint = whole_model(model, self.world.first)
        if self.world.first:
            model_folder.write(checkpoint, folder)

    def _write_model(self) -> None:
        """Write the model with its card, and its results, unless they are there."""
        config, progress, world = self.config, self.progress, self.world
        target = self.folder.model(config.name, self.step)
        if target.exists():
            return
        world.wait()
        best = config.keep == "best"
        scores = progress.best_scores if best else self.evaluate()
        part = target.with_name(f".{target.name}.part")
        if not best:
            self._write_result(part)
        if world.first:
            if best:
                shutil.copytree(self.folder.best(progress.best_step), part)
            result = {
                **facts(),
                "steps": self.step,
                "weights_of_step": progress.best_step if best else self.step,
                "tokens": config.tokens_until(self.step),
                "parameters": sum(x.numel() for x in self.result.model.parameters()),
                "skipped_steps": progress.skipped,
                "processes": world.size,
                "changes": progress.changes,
                "evaluation": scores,
                "config": config.to_dict(),
            }
            write_text(part / "README.md", model_card(config, result))
            self.folder.add_result(target, result)
            part.rename(target)
        world.wait()

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
        if not config.adapter.kind:
            learning_weights(self.model, stage.learn)
        rate = learning_rate(self.step, config.total_steps, config.optimizer)
        set_learning_rate(self.optimizer, rate)
        batches = own_batches(step_batch(self.source(stage), config, self.step), stage, self.world)
        total, carried = 0.0, None
        for i, batch in enumerate(batches):
            with gradients_shared(self.called, last=i == len(batches) - 1):
                loss, carried = self._micro_step(
                    batch, stage, self.world.data.rank * len(batches) + i
                )
            total += loss
        (total,) = self.world.all_sum(total)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm([cast(Any, p.grad) for p in parameters]))
        if math.isfinite(total) and bool(norm.isfinite()):
            torch.nn.utils.clip_grads_with_norm_(parameters, config.optimizer.clip, norm)
            self.optimizer.step()
            if self.average is not None:
                self.average.update_parameters(self.objective)
            self.carried, progress.skipped_in_a_row = carried, 0
        else:
            self._skip(total)
        self.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        return {"loss/train": total, "gradient_norm": norm.item(), "learning_rate": rate}

    def _micro_step(
        self, batch: Batch, stage: StageConfig, number: int
    ) -> tuple[float, ModelState]:
        """Add the gradient of a micro-batch; its loss, and the state to carry on."""
        batch = batch.to(self.device)
        seed = (self.config.seed, PASSING, self.step, number)
        state = initial_state(self.model, self.carried, stage, batch, seed)
        long = LongContext(stage.long_ce_window, stage.long_ce) if stage.long_ce else None
        with self._autocast():
            loss, final = self.called(batch, state, long)
        # Gradients are averaged over processes; losses of a step are to be summed.
        (loss * self.world.size).backward()
        return loss.item(), carried_state(final, batch)

    def _skip(self, loss: float) -> None:
        progress, config = self.progress, self.config
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        if progress.skipped_in_a_row > config.most_skipped:
            culprit = not_finite(self.model) or f"the loss ({loss})"
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
            arguments = (self.config, stage, self.world)
            metrics = evaluate(self.result, self.source(stage), *arguments)
            return metrics | passkey_probe(self.result, *arguments)

    def _autocast(self) -> Any:
        if self.config.precision == "float32":
            return nullcontext()
        return torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16)
