"""Scalars for TensorBoard.

Written at once and in the caller's thread: TensorBoard's own writer has a thread, which on a full
disk dies with a traceback while the run goes on to the next scalar.
"""

import os
import platform
import time
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

__all__ = ["Events"]


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
        self.path = folder / name
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
