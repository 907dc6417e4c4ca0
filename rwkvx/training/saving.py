"""Writing checkpoints beside the training: torch.distributed.checkpoint, in the background.

Every process copies its tensors to the CPU and goes on training, while a thread writes them. When
all are on the disk, the first process joins the parts, adds what is no tensor, writes the manifest
and gives the folder its name: until then there is no checkpoint.
"""

import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import HuggingFaceStorageWriter, async_save
from torch.distributed.checkpoint.api import CheckpointException

from rwkvx.checkpoint import folder as model_folder
from rwkvx.checkpoint.checkpoint import Checkpoint
from rwkvx.checkpoint.manifest import MANIFEST, write_manifest
from rwkvx.errors import WriteError
from rwkvx.files import flush, write_json
from rwkvx.training.checkpoint import Progress, Running, tensors_by_file
from rwkvx.training.run_folder import PROGRESS, RunFolder, remove
from rwkvx.training.world import World

__all__ = ["Saver"]


class Saver:
    """Saves one checkpoint at a time; every process has one, and calls it as the others do."""

    def __init__(self, folder: RunFolder, world: World) -> None:
        self.folder, self.world = folder, world
        # One process is what is meant, and torch says that it assumes so.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        # Of its own: what is sent in the background must not mix with what training sends.
        self.group = dist.new_group(backend="gloo") if world.size > 1 else None
        self.thread = ThreadPoolExecutor(1)
        self.pending: Future[None] | None = None

    def start(self, running: Running, progress: Progress) -> None:
        """Copy what is to be saved and begin to write it; waits for the checkpoint before.

        Raises:
            WriteError: that one could not be written.
        """
        self.wait()
        files = tensors_by_file(running, self.world)
        part = self.folder.unfinished(progress.step)
        index = {name: i for i, x in enumerate(files.values(), 1) for name in x}
        writer = HuggingFaceStorageWriter(
            str(part), index, save_distributed=True, enable_consolidation=True
        )
        written: Any = async_save(
            {name: x for tensors in files.values() for name, x in tensors.items()},
            storage_writer=writer,
            process_group=self.group,
            no_dist=self.world.size == 1,
        )
        model = running.model
        about = Checkpoint(model.config, {}, model.tokenizer_to_save)
        facts = asdict(progress)  # as they are now
        self.pending = self.thread.submit(self._complete, written, part, list(files), about, facts)

    def wait(self) -> None:
        """Until the checkpoint that was begun is there.

        Raises:
            WriteError: the disk refuses; then the one before is still there, and nothing of it.
        """
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait, where another error is on its way."""
        with suppress(Exception):
            self.wait()
        self.thread.shutdown()

    def _complete(
        self,
        written: Any,
        part: Path,
        files: list[str],
        about: Checkpoint,
        progress: dict[str, Any],
    ) -> None:
        target = self.folder.checkpoint(progress["step"])
        try:
            written.result()
            if self.world.first:
                _join(part, files)
                model_folder.write_about(about, part)
                write_json(part / PROGRESS, progress)
                names = sorted(p.name for p in part.iterdir() if p.name != MANIFEST)
                for name in names:
                    flush(part / name)
                write_manifest(part, names)
                self.folder.publish(part, target)
        except (OSError, CheckpointException) as error:
            if self.world.first:
                with suppress(OSError):
                    remove(part)
            raise _refusal(error, part, target) from error


def _join(part: Path, files: list[str]) -> None:
    """Keep the whole files that torch made of all processes' parts, under their names."""
    shutil.rmtree(part / "sharded")
    (part / "model.safetensors.index.json").unlink(missing_ok=True)
    for i, name in enumerate(files, 1):
        made = part / f"model-{i:05}-of-{len(files):05}.safetensors"
        made.rename(part / f"{name}.safetensors")


def _refusal(error: BaseException, part: Path, target: Path) -> BaseException:
    """What the disk said, in one line, by the name that the folder was to have."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, WriteError):
        return WriteError(str(error).replace(str(part), str(target)))
    if isinstance(error, OSError):
        return WriteError(f"cannot write {target}: {error.strerror or error}")
    return error
