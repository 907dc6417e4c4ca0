"""`kind: tokens`: a file that `rwkvx tokenize` wrote, mapped into memory."""

from dataclasses import dataclass

from rwkvx.data.sources.contract import Source
from rwkvx.data.sources.reader import Reader, Stream
from rwkvx.data.sources.text import Share
from rwkvx.data.sources.windows import Windows
from rwkvx.data.tokens import open_tokens
from rwkvx.ranges import check_ranges


@dataclass(frozen=True)
class Tokens:
    """A file of tokens; nothing is read but what a row needs.

    Attributes:
        path: of the file.
        separate: documents forget one another; else states and attention go on across.
        eval_path: another file, for evaluation; else what the file itself holds out, else its tail.
        eval_share: that tail's share of the tokens, where the file holds out nothing.
    """

    path: str
    separate: bool = True
    eval_path: str = ""
    eval_share: Share = 0.01

    def __post_init__(self) -> None:
        check_ranges(self)

    def open(self, reader: Reader) -> Source:
        file = open_tokens(reader.find(self.path), reader.tokenizer)
        stream, whole = Stream(file.tokens, file.documents, file.name), len(file.tokens)
        if self.eval_path:
            other = open_tokens(reader.find(self.eval_path), reader.tokenizer)
            held_out = Stream(other.tokens, other.documents, other.name)
            return Windows(stream, self.separate, held_out)
        at = file.training if file.training < whole else stream.tail_start(self.eval_share)
        training, held_out = stream.split(at)
        return Windows(training, self.separate, held_out if at < whole else None)
