"""A run: from its newest checkpoint to its end, a step at a time.

Axes: B batch, T time, C width.
"""

import shutil
import time
from collections import deque
from contextlib import closing, nullcontext
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils import clip_grads_with_norm_

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
from rwkvx.training.distributed import distributed, gradients_shared, shard, sharing
from rwkvx.training.evaluation import as_text, evaluate, total_loss
from rwkvx.training.facts import facts
from rwkvx.training.forward import LongContext, Objective, alone
from rwkvx.training.identity import differences, identity
from rwkvx.training.optim import build_optimizer, learning_rate, learning_weights, set_learning_rate
from rwkvx.training.outcome import Outcome, gradient_norms, move_average, step_if
from rwkvx.training.passing import PASSING, carried_state, chosen, initial_state
from rwkvx.training.plan import check_memory
from rwkvx.training.probes import passkey_probe, samples
from rwkvx.training.progress import ProgressLine, Reports, Speed
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
        # The host reads what came of a step when the next one waits on the device: nothing waits
        # for the host. A CPU has done a step when its numbers are asked for.
        self.late = 0 if self.model.device.type == "cpu" else 1
        self.unread = deque[Outcome]()
        self.updates = torch.zeros((), dtype=torch.int64, device=self.model.device)
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

    def _average(self) -> Objective | None:
        average = deepcopy(self.objective) if self.config.average else None
        if average is not None and self.world.size > 1 and self.config.parallel == "fsdp":
            shard(average)
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
        return self.average or self.objective

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
        self.updates.fill_(progress.step - progress.skipped)
        self.world.wait()
        if self.world.first:
            self.folder.forget_after(progress.step)

    def save(self) -> None:
        """Begin to write a checkpoint that an equal run goes on from."""
        self.settle()
        self.saver.start(self._running, self.progress)

    @property
    def _running(self) -> Running:
        average = None if self.average is None else self.average.model
        return Running(self.model, self.optimizer, average, self.carried)

    def _train(self, request: StopRequest) -> None:
        config, total, first = self.config, self.config.total_steps, self.world.first
        tokens, done = config.tokens_until(total), config.tokens_until(self.step)
        curves = Curves(self.folder, config) if first else Silence()
        speed = Speed(config, self.device, self.world.size)
        with ProgressLine(tokens, done, total, first) as line, closing(curves):
            reports = Reports(line, curves, speed)
            while self.step < total and not request.signal:
                reports.add(self.train_step())
                last = self.step == total
                if last or self.step % config.eval_every == 0:
                    self.settle()
                    reports.give()
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
                reports.give()

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

    def train_step(self) -> Outcome:
        """One optimiser step, which the device is given to do: nothing here waits for it.

        A step whose loss or gradient is not finite leaves everything as it is.

        Raises:
            InputError: too many of those, one after the other; said of the step `late` before.
        """
        config, stage, began = self.config, self.config.stage(self.step), time.perf_counter()
        self.model.set_topk(stage.topk or self.model.config.topk)
        self.model.recurrent_pieces = stage.pieces
        if not config.adapter.kind:
            learning_weights(self.model, stage.learn)
        rate = learning_rate(self.step, config.total_steps, config.optimizer)
        set_learning_rate(self.optimizer, rate)
        batches = own_batches(step_batch(self.source(stage), config, self.step), stage, self.world)
        total = torch.zeros((), dtype=torch.float64, device=self.model.device)
        for i, batch in enumerate(batches):
            number = self.world.data.rank * len(batches) + i
            with gradients_shared(self.called, last=i == len(batches) - 1):
                loss, carried = self._backward(batch, stage, number)
            total += loss
        outcome = self._update(began, rate, self.world.summed(total), carried)
        self.unread.append(outcome)
        self.progress.step += 1
        self.settle(self.late)
        return outcome

    def _backward(self, batch: Batch, stage: StageConfig, number: int) -> tuple[Tensor, ModelState]:
        """Add the gradient of a micro-batch; its loss, and the state to carry on."""
        batch = batch.to(self.device)
        seed = (self.config.seed, PASSING, self.step, number)
        state = initial_state(self.model, self.carried, stage, batch, seed)
        for outcome in self.unread:  # whether what it carries counts, the device knows
            newer = initial_state(self.model, outcome.carried, stage, batch, seed)
            state = chosen(outcome.finite, newer, state)
        long = LongContext(stage.long_ce_window, stage.long_ce) if stage.long_ce else None
        with self._autocast():
            loss, final = self.called(batch, state, long)
        # Gradients are averaged over processes; losses of a step are to be summed.
        (loss * self.world.size).backward()
        return loss.detach(), carried_state(final, batch)

    def _update(self, began: float, rate: float, loss: Tensor, carried: ModelState) -> Outcome:
        """Change the weights by their gradients, unless something is not finite."""
        config = self.config
        learned = {n: p for n, p in self.model.named_parameters() if p.grad is not None}
        norms = gradient_norms([cast(Tensor, p.grad) for p in learned.values()])
        outcome = Outcome(self.step + 1, began, rate, loss, norms, list(learned), carried)
        clip_grads_with_norm_(learned.values(), config.optimizer.clip, outcome.norm)
        step_if(outcome.finite, self.optimizer)
        if self.average is not None:
            keep = config.average * (self.updates > 0).double()  # the first is taken as it is
            move_average(self.average, self.objective, (1 - keep) * outcome.finite)
        self.updates += outcome.finite
        self.optimizer.zero_grad(set_to_none=True)
        return outcome

    def settle(self, late: int = 0) -> None:
        """Read what came of all steps but the `late` last ones.

        Raises:
            InputError: too many steps in a row without an update.
        """
        config, progress = self.config, self.progress
        while len(self.unread) > late:
            outcome = self.unread.popleft()
            if not outcome.is_skipped:
                self.carried, progress.skipped_in_a_row = outcome.carried, 0
                continue
            progress.skipped += 1
            progress.skipped_in_a_row += 1
            if progress.skipped_in_a_row > config.most_skipped:
                raise not_finite(config, outcome.culprit(self.model), outcome.step)

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
