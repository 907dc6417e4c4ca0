"""Running lm-eval inside a command of ours: quietly, and with its refusals in one line."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import datasets
import lm_eval
import lm_eval.api.task
import lm_eval.evaluator
import lm_eval.utils
import tqdm

import rwkvx
import rwkvx_kernels
from rwkvx.errors import InputError
from rwkvx_evals.lm.replace import replaced
from rwkvx_evals.lm.tasks import first_line

_LM_EVAL = Path(lm_eval.__file__).parent
_OURS = (*rwkvx.__path__, *rwkvx_kernels.__path__, str(Path(__file__).parents[1]))


@contextlib.contextmanager
def templates_compiled_once() -> Iterator[None]:
    """lm-eval compiles a task's templates again for every item: most of its time before scoring.

    It also asks git for a commit of the current folder, which complains outside a repository.
    """
    environment = lm_eval.utils.env
    compiled = functools.cache(environment.from_string)
    with (
        replaced(environment, "from_string", compiled),
        replaced(lm_eval.evaluator, "get_git_commit_hash", lambda *_, **__: None),
    ):
        yield


@contextlib.contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Keeps lm-eval's own bars and remarks away, and its bootstrap inside this process."""
    # The hub client warns at every retry; what it says in the end becomes one line of ours.
    loggers = [logging.getLogger(name) for name in ("lm_eval", "huggingface_hub", "datasets")]
    levels = [logger.level for logger in loggers]
    bars = datasets.are_progress_bars_disabled()
    silent = functools.partial(tqdm.tqdm, disable=True)
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    processes = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            # Bound when a module is imported, and when a function of lm_eval.api.metrics runs.
            replaced(lm_eval.api.task, "tqdm", silent),
            replaced(tqdm, "tqdm", silent),
        ):
            yield
    finally:
        if processes is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = processes
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


# Where lm-eval remarks upon labels out of range, and upon metrics that some items lack.
_WARNERS = ("lm_eval.api.task", "lm_eval.evaluator_utils")


class _Collector(logging.Handler):
    """Counts messages by their first line."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.counts: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        self.counts[first_line(record.getMessage())] += 1


@contextlib.contextmanager
def collected_warnings() -> Iterator[Counter[str]]:
    """What lm-eval warns of while it scores: it belongs beside the numbers, not on the terminal."""
    collector = _Collector()
    loggers = [logging.getLogger(name) for name in _WARNERS]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(collector)
        logger.setLevel(logging.WARNING)
        logger.propagate = False
    try:
        yield collector.counts
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(collector)
            logger.setLevel(level)
            logger.propagate = propagate


@contextlib.contextmanager
def refusals_in_one_line() -> Iterator[None]:
    """Raises InputError for what lm-eval refuses; errors of our own code stay as they are."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # lm-eval refuses with whatever comes to hand, assertions included
        if not _is_of_lm_eval(error):
            raise
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise InputError(f"lm-eval refuses: {kind}{first_line(error)}") from error


def _is_of_lm_eval(error: BaseException) -> bool:
    """Whether lm-eval's code, or what it calls, raised an error, and not ours below it."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if Path(frame.filename).is_relative_to(_LM_EVAL):
            return True
        if any(Path(frame.filename).is_relative_to(root) for root in _OURS):
            return False
    return False
