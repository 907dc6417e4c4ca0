"""`kind: text`: plain text out of files."""

from dataclasses import dataclass
from typing import Annotated

from rwkvx.data.sources.contract import Source
from rwkvx.data.sources.reader import Documents, FileDocuments, HubDocuments, Reader, Stream
from rwkvx.data.sources.windows import Windows
from rwkvx.errors import InputError
from rwkvx.ranges import Number, check_ranges

Share = Annotated[float, Number(0, 0.5)]
Megabytes = Annotated[float, Number(0, 1e9, above=True)]


@dataclass(frozen=True)
class Text:
    """Text files, read into memory.

    Attributes:
        paths: .txt, .jsonl with a "text" field, .tar of .txt; also compressed (.xz, .gz, .bz2).
        limit_mb: read at most so many megabytes of text.
        unwrap: join the lines of paragraphs that are wrapped by a width.
        separate: documents forget one another; else states and attention go on across.
        eval_paths: text for evaluation; else the tail of the text is kept for it.
        eval_share: that tail's share of the tokens; 0 for no evaluation.
    """

    paths: tuple[str, ...]
    limit_mb: Megabytes = 1024.0
    unwrap: bool = False
    separate: bool = True
    eval_paths: tuple[str, ...] = ()
    eval_share: Share = 0.01

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.paths:
            raise InputError("paths names no text file")

    def open(self, reader: Reader) -> Source:
        stream = reader.stream(FileDocuments(self.paths, self.unwrap), self.limit_mb)
        evaluation = FileDocuments(self.eval_paths, self.unwrap) if self.eval_paths else None
        return windows(reader, stream, evaluation, self.eval_share, self.separate, self.limit_mb)


@dataclass(frozen=True)
class Hub:
    """A data set of Hugging Face's hub or of a folder, read into memory.

    Attributes:
        name, subset, split, column: of the data set; see `rwkvx.data.hub`.
        streaming: read items as they come instead of downloading the whole data set first.
        eval_split: for evaluation; else the tail of the text is kept for it.
        limit_mb, separate, eval_share: as for text.
    """

    name: str
    subset: str = ""
    split: str = "train"
    column: str = "text"
    streaming: bool = True
    limit_mb: Megabytes = 1024.0
    separate: bool = True
    eval_split: str = ""
    eval_share: Share = 0.01

    def __post_init__(self) -> None:
        check_ranges(self)

    def open(self, reader: Reader) -> Source:
        stream = reader.stream(self._documents(self.split), self.limit_mb)
        evaluation = self._documents(self.eval_split) if self.eval_split else None
        return windows(reader, stream, evaluation, self.eval_share, self.separate, self.limit_mb)

    def _documents(self, split: str) -> HubDocuments:
        return HubDocuments(self.name, self.subset, split, self.column, self.streaming)


def windows(
    reader: Reader,
    stream: Stream,
    evaluation: Documents | None,
    share: float,
    separate: bool,
    limit_mb: float,
) -> Windows:
    """Windows of a stream, with evaluation on other documents or on the stream's own tail."""
    if evaluation is not None:
        return Windows(stream, separate, reader.stream(evaluation, limit_mb))
    training, held_out = stream.split(stream.tail_start(share))
    return Windows(training, separate, held_out if share else None)
