"""`kind: chat`: conversations and instructions, of which the answers are learned.

Axes: R rows, T time.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rwkvx.data.documents import find_files, json_lines
from rwkvx.data.sources.contract import Rows, Source, Wanted
from rwkvx.data.sources.reader import Reader
from rwkvx.data.sources.text import Megabytes, Share
from rwkvx.errors import InputError, shown
from rwkvx.ranges import OneOf, check_ranges

Messages = list[dict[str, str]]
SPEAKERS = {"system": "System", "user": "User", "assistant": "Assistant"}
LEARNED = "assistant"


@dataclass(frozen=True)
class Chat:
    """Conversations, one a line of JSON, each read whole and from nothing.

    A line is {"messages": [{"role", "content"}, ...]}, {"instruction", "input", "output"} (a user's
    turn and the answer; "input" may be missing), or {"prompt", "completion"} (plain text). Turns
    are written by the tokenizer's chat template where it has one, else as RWKV's models know them:
    "User: ...", an empty line, "Assistant: ...", an empty line.

    Attributes:
        paths: .jsonl files, also compressed (.xz, .gz, .bz2).
        limit_mb: read at most so many megabytes of text.
        learn: "answers", or "all" for every token.
        eval_paths: conversations for evaluation; else the last ones of `paths` are kept for it.
        eval_share: their share of all conversations; 0 for no evaluation.
    """

    paths: tuple[str, ...]
    limit_mb: Megabytes = 1024.0
    learn: Annotated[str, OneOf("answers", "all")] = "answers"
    eval_paths: tuple[str, ...] = ()
    eval_share: Share = 0.01

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.paths:
            raise InputError("paths names no file of conversations")

    def open(self, reader: Reader) -> Source:
        training = self._read(self.paths, reader)
        if self.eval_paths:
            held_out = self._read(self.eval_paths, reader)
        else:
            kept = len(training) - min(len(training) - 1, ceil(self.eval_share * len(training)))
            training, held_out = training[:kept], training[kept:]
        end = int(reader.tokenizer.eos_token_id)
        return Conversations(training, end, Conversations(held_out, end) if held_out else None)

    def _read(self, paths: tuple[str, ...], reader: Reader) -> list["Conversation"]:
        found, room = [], self.limit_mb * 1e6
        for path in find_files(paths, reader.data):
            for where, item in json_lines(path):
                if room <= 0:
                    break
                spans, special = spans_of(item, reader.tokenizer, where)
                found.append(Conversation.of(spans, special, reader.tokenizer, self.learn == "all"))
                room -= sum(len(text.encode("utf-8", "surrogatepass")) for text, _ in spans)
        if not found:
            raise InputError(f"no conversation in {', '.join(paths)}")
        return found


class Conversation(NamedTuple):
    """Tokens of one conversation, the end of document last, and which of them are learned."""

    ids: NDArray[np.int32]
    learned: NDArray[np.bool]

    @classmethod
    def of(
        cls, spans: Sequence[tuple[str, bool]], special: bool, tokenizer: Any, every: bool
    ) -> "Conversation":
        """Tokenise span by span: an answer is then cut from its prompt where generation cuts it.

        special: text that spells a special token is that token.
        """
        ids: list[int] = []
        learned: list[bool] = []
        for text, learn in spans:
            part = tokenizer.encode(
                text, add_special_tokens=False, split_special_tokens=not special
            )
            ids += part
            learned += [learn or every] * len(part)
        ended = spans[-1][1] or every
        return cls(
            np.asarray([*ids, tokenizer.eos_token_id], dtype=np.int32),
            np.asarray([*learned, ended], dtype=bool),
        )


def spans_of(
    item: dict[str, Any], tokenizer: Any, where: str
) -> tuple[list[tuple[str, bool]], bool]:
    """What a line says, cut into what is given and what is learned (True).

    Beside that, whether special tokens are spelled in it, as a chat template does.

    Raises:
        InputError: a line of none of the known shapes, or a role that has no name.
    """
    if isinstance(item.get("prompt"), str) and isinstance(item.get("completion"), str):
        return [(item["prompt"], False), (item["completion"], True)], False
    messages = item.get("messages")
    if isinstance(item.get("instruction"), str) and isinstance(item.get("output"), str):
        asked = "\n".join(str(x) for x in (item["instruction"], item.get("input")) if x)
        messages = [
            {"role": "user", "content": asked},
            {"role": LEARNED, "content": item["output"]},
        ]
    if not isinstance(messages, list) or not messages:
        raise InputError(f'{where}: none of "messages", "instruction" and "prompt" is there')
    for message in messages:
        good = isinstance(message, dict) and isinstance(message.get("content"), str)
        if not good or message.get("role") not in list(SPEAKERS):
            raise InputError(f"{where}: no role of {', '.join(SPEAKERS)} in {shown(message)}")
    if getattr(tokenizer, "chat_template", None):
        return list(_by_template(messages, tokenizer, where)), True
    return list(_by_names(messages)), False


def _by_names(messages: Messages) -> Iterator[tuple[str, bool]]:
    """As RWKV's models are asked: an answer ends with an empty line."""
    for message in messages:
        content = message["content"].strip().replace("\r\n", "\n")
        # An empty line ends a turn, so that none may stand inside of one.
        while "\n\n" in content:
            content = content.replace("\n\n", "\n")
        learned = message["role"] == LEARNED
        yield f"{SPEAKERS[message['role']]}:", False
        yield f" {content}\n\n", learned


def _by_template(messages: Messages, tokenizer: Any, where: str) -> Iterator[tuple[str, bool]]:
    """As the tokenizer's template writes them: what an answer adds to its prompt is learned."""

    def written(count: int, prompt: bool) -> str:
        return str(
            tokenizer.apply_chat_template(
                messages[:count], tokenize=False, add_generation_prompt=prompt
            )
        )

    done = ""
    for i, message in enumerate(messages):
        if message["role"] != LEARNED:
            continue
        for text, learned in ((written(i, True), False), (written(i + 1, False), True)):
            if not text.startswith(done):
                raise InputError(f"{where}: the chat template writes a turn anew when more follow")
            yield text[len(done) :], learned
            done = text
    if done != (whole := written(len(messages), False)):
        yield whole.removeprefix(done), False


class Conversations:
    """Rows of whole conversations, each from nothing; those that do not fit a row are cut.

    A row begins with the end of document, as every conversation in it does; what is left of it is
    filled with that and not learned.
    """

    def __init__(
        self, conversations: list[Conversation], end: int, held_out: Source | None = None
    ) -> None:
        self.conversations, self.end, self.held_out = conversations, end, held_out
        self._packed: dict[int, list[list[int]]] = {}

    def rows(self, wanted: Wanted) -> Rows:
        packed = self._rows_of(wanted.length)
        shape = (len(wanted.numbers), wanted.length)
        ids = np.full((shape[0], shape[1] + 1), self.end, dtype=np.int64)
        learned, starts = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
        for row, number in enumerate(wanted.numbers):
            epoch, index = divmod(number, len(packed))
            order = np.random.default_rng((*wanted.order, epoch)).permutation(len(packed))
            at = 0
            for which in packed[order[index]]:
                x = self.conversations[which]
                end = min(at + len(x.ids), wanted.length)
                ids[row, at + 1 : end + 1] = x.ids[: end - at]
                learned[row, at:end] = x.learned[: end - at]
                starts[row, at] = True
                at = end
            starts[row, at : at + 1] = True  # filling, if any is left
        weights = learned / max(1, learned.sum())
        return Rows(ids, weights.astype(np.float32), np.zeros(shape, dtype=bool), starts)

    def evaluations(self) -> dict[str, Source]:
        return {} if self.held_out is None else {"eval": self.held_out}

    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for x in self.conversations:
            digest.update(len(x.ids).to_bytes(8, "little") + x.ids.tobytes() + x.learned.tobytes())
        return {"content": digest.hexdigest()[:16]}

    def _rows_of(self, length: int) -> list[list[int]]:
        """Which conversations stand together in rows of that length: always the same."""
        if length not in self._packed:
            rows: list[list[int]] = []
            left = 0
            for which in np.random.default_rng(0).permutation(len(self.conversations)).tolist():
                size = len(self.conversations[which].ids)
                if not rows or size > left:
                    rows.append([])
                    left = length
                rows[-1].append(which)
                left -= min(size, left)
            self._packed[length] = rows
        return self._packed[length]
