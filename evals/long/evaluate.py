"""A whole run: what is asked, by however many processes, and the files it leaves."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import torch

from rwkvx.errors import InputError
from rwkvx_evals.bench.machine import describe, installed
from rwkvx_evals.files import code_fingerprint, digest, package_version
from rwkvx_evals.long import loss
from rwkvx_evals.long.engine import Engine
from rwkvx_evals.long.folder import RunFolder, whose
from rwkvx_evals.long.plan import Plan, Settings, Target, Unit
from rwkvx_evals.long.remote import RemoteRun
from rwkvx_evals.long.report.words import duration
from rwkvx_evals.long.results import (
    Results,
    Row,
    check_tokens,
    sample_rows,
    task_results,
    total,
)
from rwkvx_evals.long.rows import FAILURES
from rwkvx_evals.long.shards import SharedJournal
from rwkvx_evals.long.task import Ids, Task
from rwkvx_evals.long.work import Job, Worker, processes, timing
from rwkvx_evals.models.endpoint import Endpoint
from rwkvx_evals.models.reader import Reader, read_prompt

# Tokens of a short text, to measure speed for the estimate.
PROBE = 512
PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "openai")


@dataclass(frozen=True)
class Request:
    """What to ask.

    Attributes:
        tasks: by name. lengths: tokens of prompt and answer. samples: of each task and length.
        loss: measure the loss by position too, on as many windows of each length.
        batch: prompts read together at most. share: read common prefixes once.
        concurrency: prompts at an endpoint at a time. command: for the report.
    """

    tasks: Mapping[str, Task]
    lengths: tuple[int, ...]
    samples: int
    settings: Settings
    loss: bool = False
    batch: int | None = None
    share: bool = True
    concurrency: int = 8
    command: str = ""


class Run:
    """One process's part in a run."""

    def __init__(
        self,
        model: Reader | Endpoint,
        request: Request,
        writer: Any,
        folder: RunFolder,
        *,
        quiet: bool = False,
    ) -> None:
        """Plans everything, and computes nothing.

        Raises InputError: a task or measure of which nothing can be asked.
        """
        self.model, self.request, self.folder, self.quiet = model, request, folder, quiet
        if isinstance(model, Endpoint):
            target = Target(
                model.fingerprint(), max_length=model.max_length, tokenizer=model.tokenizer
            )
            if request.loss:
                raise InputError(f"{loss.NAME} needs a model on this machine, not an endpoint")
        else:
            target = target_of(model)
        self.weights = target.weights
        tasks = (request.tasks, request.lengths, request.samples)
        self.plan = Plan(
            *tasks, writer, target, request.settings, batch=request.batch, share=request.share
        )
        self.losses = None
        if request.loss and not isinstance(model, Endpoint):
            books = loss.Books(model.tokenizer, writer.data, writer.book)
            room = target.max_length
            self.losses = loss.LossPlan(
                books,
                request.lengths,
                request.samples,
                common=[self.weights, code_fingerprint(), request.settings.dtype],
                room=None if room is None else room - len(target.frame.before),
            )

    def answer(self) -> None:
        """Answers what the run folder lacks, together with whoever else works in it."""
        rank, _ = processes()
        loud = not self.quiet and rank == 0
        if loud and (changed := self.changed()):
            click.echo(f"warning: {changed}", err=True)
        if isinstance(self.model, Endpoint):
            remote = RemoteRun(
                self.model, self.plan, self.folder.journal, self.folder.claims,
                concurrency=self.request.concurrency, quiet=self.quiet,
            )  # fmt: skip
            if loud:
                click.echo(announce_remote(self.plan, len(remote.missing())), err=True)
            remote.run()
            return
        worker = Worker(
            self.folder.journal, self.folder.claims, self.model.device, quiet=self.quiet
        )
        jobs = self.jobs(self.model)
        left = sum(job.tokens for job in worker.missing(jobs))
        if loud:
            click.echo(announce(self.plan, self.losses, left), err=True)
            if left:
                click.echo(estimate(self.model, self.plan, left), err=True)
        worker.run(jobs)

    def changed(self) -> str | None:
        """A warning where this folder has answers to other samples of the same names."""
        questions, rows = self.plan.questions, self.folder.journal.rows.values()
        asked = {row["id"]: row["prompt"] for row in rows if row.get("id") in questions}
        other = sum(questions[name].sample != prompt for name, prompt in asked.items())
        if not other:
            return None
        return (
            f"{other} samples were others when this folder was last worked on (another data folder "
            "or book?): they are asked again"
        )

    def jobs(self, model: Reader) -> list[Job]:
        """What can be claimed, the longest first: what does not fit is known soon, and processes
        end together."""
        jobs = plan_jobs(model, self.plan, self.folder.journal)
        for question in self.losses.questions if self.losses else ():
            jobs.append(self._window(model, question))
        return sorted(jobs, key=lambda job: (-job.tokens, job.key))

    def _window(self, model: Reader, question: loss.Question) -> Job:
        tokens = loss.tokens_to_read(question.length)

        def do(advance: Any) -> tuple[int, int]:
            assert self.losses is not None
            self.folder.journal.append([self.losses.answer(model, question, advance)])
            return tokens, 0

        label = f"{loss.NAME} {question.length:,}"
        return Job(question.key, (question.key,), label, question.length, tokens, do)

    def results(self) -> tuple[Results, list[Row], list[Row]]:
        """What results.json holds, the samples' rows and the windows' rows."""
        journal, plan = self.folder.journal, self.plan
        samples = sample_rows(journal.rows[q.key] for q in plan.questions.values())
        questions = self.losses.questions if self.losses else []
        windows = sample_rows(journal.rows[q.key] for q in questions)
        machine = describe()
        found: Results = {
            "model": self.model.name,
            "weights": self.weights,
            "version": package_version(),
            "code": code_fingerprint(),
            "commit": machine["commit"],
            "command": self.request.command,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine | {"gpu": _gpu(self.model)},
            "versions": {name: v for name in PACKAGES if (v := installed(name))},
            "settings": asdict(self.request.settings),
            "lengths": sorted(self.request.lengths),
            "samples": self.request.samples,
            "sample_manifest": plan.manifest(),
            "answers": digest([samples, windows]),
            "prompt_tokens": {"read": plan.tokens_shared(), "without_sharing": plan.tokens_alone()},
            "total": total(samples, len(plan.skipped)),
            "tasks": {name: self._task(name, samples) for name in plan.tasks},
            "timing": timing(list(journal.rows.values())),
            "warnings": [w for w in [check_tokens(samples), whole_prompts(self.model)] if w],
        }
        if self.losses:
            found[loss.NAME] = self._losses(windows)
        return found, samples, windows

    def _task(self, name: str, samples: Sequence[Row]) -> dict[str, Any]:
        task = self.plan.tasks[name]
        missed = [s for s in self.plan.skipped if s.task == name]
        skipped = Counter(s.length for s in missed)
        rows = [row for row in samples if row["task"] == name]
        about = {"about": task.about, "source": task.source}
        return about | task_results(rows, skipped) | {"reasons": sorted({s.reason for s in missed})}

    def _losses(self, windows: Sequence[Row]) -> dict[str, Any]:
        assert self.losses is not None
        lengths = {}
        for length in sorted(self.request.lengths):
            rows = [row for row in windows if row["length"] == length]
            counts = {kind: sum(row["status"] == kind for row in rows) for kind in FAILURES}
            failed = sum(counts.values())
            lengths[str(length)] = {
                **loss.collect(rows),
                "asked": len(rows),
                "scored": len(rows) - failed,
                "failed": failed,
                "skipped": len(self.losses.skipped.get(length, [])),
                **counts,
            }
        reasons = {reason for found in self.losses.skipped.values() for reason in found}
        paper = {"short_window": loss.SHORT, "stride": loss.STRIDE, "alpha": loss.ALPHA}
        return {"lengths": lengths, **paper, "beta": loss.BETA, "reasons": sorted(reasons)}


def evaluate(
    model: Reader | Endpoint, request: Request, writer: Any, out: Path, *, quiet: bool = False
) -> Results:
    """Answers what the folder lacks and writes all files; returns the results.

    Raises InputError: a folder of another model or version, nothing to ask, a full disk.
    """
    _, several = processes()
    mine = whose(model.name, model.fingerprint(), request.settings)
    with ExitStack() as stack:
        folder = stack.enter_context(RunFolder(out, mine, several=several > 1))
        run = Run(model, request, writer, folder, quiet=quiet)
        run.answer()
        return folder.report(run.results)


def target_of(model: Reader) -> Target:
    """What a plan needs to know of a model that reads tokens."""
    limits = (model.max_length, model.rows, model.continues)
    return Target(model.fingerprint(), model.frame, *limits)


def whole_prompts(model: Reader | Endpoint) -> str | None:
    """A warning for a model that shares little and whose memory grows with the prompt."""
    if isinstance(model, Endpoint) or model.continues:
        return None
    return (
        f"the cache of {model.name} starts anew where several tokens are read onto it: every "
        "prompt is read in one call, and prefixes are shared before short endings only"
    )


def plan_jobs(model: Reader, plan: Plan, journal: SharedJournal) -> list[Job]:
    """The units of a plan as jobs of the engine."""

    def job(unit: Unit) -> Job:
        def do(advance: Any) -> tuple[int, int]:
            engine = Engine(model, plan, journal, advance)
            engine.ask(unit)
            return engine.read, engine.generated

        questions = [plan.questions[label] for label in unit.node.members()]
        names = sorted({question.task for question in questions})
        label = f"{names[0]}{' ...' if len(names) > 1 else ''} {unit.length:,}"
        keys = tuple(question.key for question in questions)
        return Job(unit.key, keys, label, unit.length, unit.tokens, do)

    return [job(unit) for unit in plan.units]


def announce(plan: Plan, losses: loss.LossPlan | None, left: int) -> str:
    """What is about to be read."""
    shared, alone = plan.tokens_shared(), plan.tokens_alone()
    text = (
        f"{len(plan.questions):,} samples of {len(plan.tasks)} tasks: {shared:,} prompt tokens "
        f"with shared prefixes ({alone:,} without)"
    )
    if losses:
        tokens = sum(loss.tokens_to_read(q.length) for q in losses.questions)
        text += f"; {len(losses.questions)} windows for the loss: {tokens:,} tokens"
    skipped = len(plan.skipped) + sum(
        len(found) for found in (losses.skipped if losses else {}).values()
    )
    if skipped:
        text += f"; {skipped} are skipped: the report says why"
    return text + (f"; {left:,} tokens are left to read" if left else "; all are answered")


def announce_remote(plan: Plan, left: int) -> str:
    """What is about to be sent, and what it may cost."""
    answers = sum(plan.limit(question).tokens for question in plan.questions.values())
    return (
        f"{len(plan.questions):,} requests, {left:,} of them left: {plan.tokens_alone():,} prompt "
        f"tokens by this tokenizer and at most {answers:,} answer tokens in all"
    )


@torch.inference_mode()
def estimate(model: Reader, plan: Plan, left: int) -> str:
    """About how long reading the rest takes, from the speed of a short text."""
    longest = max(plan.questions.values(), key=lambda q: q.tokens, default=None)
    if longest is None:
        ids: Ids = torch.arange(PROBE).remainder(model.vocab_size).numpy()
    else:
        ids = plan.ids(longest)[:PROBE]
    ids_1T = torch.from_numpy(ids)[None].to(model.device)
    for _ in range(2):  # the first call may compile
        began = time.perf_counter()
        logits, _ = read_prompt(model, ids_1T, model.start(1, len(ids)), "last")
        assert logits is not None
        logits[0, 0, 0].item()  # waits for the device
        seconds = time.perf_counter() - began
    speed = len(ids) / max(seconds, 1e-9)
    about = f"about {duration(left / speed)} to read them at the {speed:,.0f} tokens/s"
    return f"{about} of a short text; answers are not counted"


def _gpu(model: Reader | Endpoint) -> str | None:
    if isinstance(model, Endpoint) or model.device.type != "cuda":
        return None
    return torch.cuda.get_device_name(model.device)
