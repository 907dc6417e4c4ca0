"""Metrics of a run as curves: lines of JSON, and scalars for TensorBoard.

Written at once and in the caller's thread: TensorBoard's own writer has a thread, which on a full
disk dies with a traceback while the run goes on to the next scalar.
"""

import math
import os
import platform
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any

from rwkvx.training.config import TrainConfig
from rwkvx.training.run_folder import RunFolder

__all__ = ["Curves", "Events", "Silence"]


class Events:
    """One file of events in `folder`, which is made.

    Raises:
        ModuleNotFoundError: TensorBoard is not installed.
        OSError: the disk refuses; then the file ends with the scalar before.
    """

    def __init__(self, folder: Path) -> None:
        import tensorboard.compat.proto.event_pb2  # noqa: F401 (before anything is written)

        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():010.0f}.{platform.node()}.{os.getpid()}"
        # A number, as in TensorBoard's own names: runs of one process may begin in one second.
        paths = (folder / f"{name}.{number}" for number in count())
        self.path = next(path for path in paths if not path.exists())
        self._add(file_version="brain.Event:2")

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Add a point to the curve `name`."""
        self._add(step=step, summary={"value": [{"tag": name, "simple_value": value}]})

    def _add(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = BytesIO()
        RecordWriter(record).write(Event(wall_time=time.time(), **fields).SerializeToString())
        before = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("ab") as file:
                file.write(record.getvalue())
        except OSError as error:
            with suppress(OSError):
                os.truncate(self.path, before)
            error.filename = str(self.path)
            raise


class Silence:
    """Curves of a process that writes none."""

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Curves:
    """Metrics of a run, a point at a time: to metrics.jsonl, to TensorBoard if it is there, and to
    the tracker that the config names."""

    def __init__(self, folder: RunFolder, config: TrainConfig) -> None:
        self.folder, self.tracker = folder, None
        if config.track:
            # Both have the same interface.
            self.tracker = import_module(config.track)
            self.tracker.init(project="rwkvx", name=config.name, config=config.to_dict())
        self.events: Events | None = None
        try:
            self.events = Events(folder.path / "tensorboard")
        except ModuleNotFoundError:
            print("no TensorBoard events: `pip install rwkvx[train]` adds them", file=sys.stderr)

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a point to each curve."""
        # JSON has no number for NaN and infinity.
        numbers = {name: x if math.isfinite(x) else None for name, x in metrics.items()}
        self.folder.log(step=step, **numbers)
        if self.events is not None:
            for name, value in metrics.items():
                self.events.add_scalar(name, value, step)
        if self.tracker is not None:
            self.tracker.log(dict(metrics), step=step)

    def close(self) -> None:
        """No more points."""
        if self.tracker is not None:
            self.tracker.finish()
