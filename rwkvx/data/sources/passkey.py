"""`kind: passkey`: prompts with a hidden number and its answer, fresh for every step.

Axes: R rows, T time.
"""

from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from rwkvx.data.passkey import Filler, Ids, PasskeyBuilder, standard_filler
from rwkvx.data.sources.contract import Rows, Source, Wanted
from rwkvx.data.sources.reader import FileDocuments, Reader, Stream
from rwkvx.data.sources.text import Megabytes
from rwkvx.errors import InputError
from rwkvx.ranges import Number, check_ranges
from rwkvx.tokenizers.file import count_ids

Share = Annotated[float, Number(0, 1)]


@dataclass(frozen=True)
class Passkey:
    """Passkey prompts.

    Attributes:
        paths: text files whose prose is used as filler.
        limit_mb: read at most so many megabytes of text.
        prose: share of samples whose filler is prose; the rest has the standard sentences.
        other_weight: weight of the mean loss over other tokens beside that of the answers.
        ask_again: share of the pieces (`recurrent_length`) between the needle's and the last that
            ask for the key as well: more to learn from a long sequence.
        noise: largest share of prose tokens that random ones replace, drawn for each sample: other
            text holds tokens that the prose never shows.
        numbers: most numbers written over a thousand tokens of prose, drawn for each sample:
            digits that are not the key's, as in a list of ages or dates.
    """

    paths: tuple[str, ...] = ()
    limit_mb: Megabytes = 1024.0
    prose: Share = 0.5
    other_weight: Annotated[float, Number(0, 1e6)] = 0.2
    ask_again: Share = 0.0
    noise: Share = 0.0
    numbers: Annotated[float, Number(0, 1000)] = 0.0

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.prose > 0 and not self.paths:
            raise InputError("prose > 0 needs paths with prose")

    def open(self, reader: Reader) -> Source:
        prose = None
        if self.paths:
            prose = reader.stream(FileDocuments(self.paths), self.limit_mb).tokens
        return Prompts(self, reader.tokenizer, prose)


class Prompts:
    """Prompts with answers; filler of standard sentences or random prose."""

    def __init__(self, options: Passkey, tokenizer: Any, prose: NDArray[np.int32] | None) -> None:
        self.options, self.tokenizer, self.prose = options, tokenizer, prose
        self.builder, self.standard = PasskeyBuilder(tokenizer), standard_filler(tokenizer)
        self.vocab_size = count_ids(tokenizer)

    def rows(self, wanted: Wanted) -> Rows:
        """One prompt a row, its last tokens padded with the end of document."""
        rng = np.random.default_rng(wanted.fresh)
        count, length = len(wanted.numbers), wanted.length
        ids = np.full((count, length + 1), self.tokenizer.eos_token_id, dtype=np.int64)
        answers = np.zeros((count, length), dtype=bool)
        used = np.zeros((count, length), dtype=bool)
        for row in range(count):
            tokens, asked = self._sample(wanted, rng)
            ids[row, : len(tokens)] = tokens
            answers[row, : len(tokens) - 1] = asked[1:]
            used[row, : len(tokens) - 1] = True
        other = used & ~answers
        share = self.options.other_weight
        weights = answers / answers.sum() + share * (other / other.sum())
        return Rows(ids, weights.astype(np.float32), answers, np.zeros_like(answers))

    def evaluations(self) -> dict[str, Source]:
        """Each kind of filler alone, with prompts that no step of training draws."""
        kinds = {"standard": 0.0} if self.prose is None else {"standard": 0.0, "prose": 1.0}
        return {
            name: Prompts(replace(self.options, prose=share), self.tokenizer, self.prose)
            for name, share in kinds.items()
        }

    def identity(self) -> dict[str, Any]:
        files = ("paths", "limit_mb")
        options = {name: x for name, x in asdict(self.options).items() if name not in files}
        if self.prose is None:
            return options
        content = Stream(self.prose, np.zeros(0, dtype=np.int64))
        return {**options, "content": content.identity}

    def _sample(self, wanted: Wanted, rng: np.random.Generator) -> tuple[Ids, NDArray[np.bool]]:
        """At most T + 1 tokens, prompt and answer, any alignment to chunks; where answers stand."""
        room, key = wanted.length + 1, _random_key(rng)
        answer = self.builder.answer(key)
        longest = room - len(answer)
        if longest < self.builder.minimum:
            raise InputError(
                f"a passkey sequence of {room - 1} tokens is too short: prompt and answer need "
                f"{self.builder.minimum + len(answer) - 1} with this tokenizer"
            )
        shortest = max(self.builder.minimum, longest - 64)
        length = int(rng.integers(shortest, max(shortest, longest) + 1))
        depth = self._depth(wanted, length, len(self.builder.needle(key)), rng)
        filler, offset = self._filler(room, rng)
        prompt = self.builder.build(filler, length, depth, key, offset=offset)
        tokens = np.concatenate([prompt.ids, answer])
        asked = np.arange(len(tokens)) >= length
        self._ask_again(wanted, tokens, asked, prompt.needle_start, key, rng)
        return tokens, asked

    def _filler(self, room: int, rng: np.random.Generator) -> tuple[Filler, int]:
        """Prose or the standard sentences, and where to start in them."""
        if rng.random() < self.options.prose and self.prose is not None:
            if len(self.prose) <= room:
                raise InputError(
                    f"the prose of paths has {len(self.prose)} tokens, a passkey sequence "
                    f"needs more than {room}"
                )
            start = int(rng.integers(0, len(self.prose) - room))
            window = self.prose[start : start + room].astype(np.int64)
            if self.options.noise:
                replaced = rng.random(room) < rng.random() * self.options.noise
                window[replaced] = rng.integers(1, self.vocab_size, size=int(replaced.sum()))
            for _ in range(rng.poisson(rng.random() * self.options.numbers * room / 1000)):
                number = self.builder.encode(f" {rng.integers(1, 10 ** rng.integers(1, 6))}. ")
                start = int(rng.integers(0, room - len(number)))
                window[start : start + len(number)] = number
            return Filler("prose", np.empty(0, np.int64), window), 0
        offset = int(rng.integers(0, 2 * self.standard.natural_length)) if rng.random() < 0.5 else 0
        return self.standard, offset

    def _ask_again(
        self,
        wanted: Wanted,
        tokens: Ids,
        asked: NDArray[np.bool],
        needle_start: int,
        key: int,
        rng: np.random.Generator,
    ) -> None:
        """Question and answer also in pieces between the needle's and the last, in the filler."""
        size, question = wanted.recurrent_length, self.builder.question
        if not size:
            return
        answer = self.builder.answer(key)[:-1]  # the text goes on
        inserted = np.concatenate([question, answer])
        first = (needle_start + len(self.builder.needle(key))) // size + 1
        for piece in range(first, wanted.length // size - 1):
            if len(inserted) > size or rng.random() >= self.options.ask_again:
                continue
            start = piece * size + int(rng.integers(0, size - len(inserted) + 1))
            tokens[start : start + len(inserted)] = inserted
            asked[start + len(question) : start + len(inserted)] = True

    def _depth(self, wanted: Wanted, length: int, needle: int, rng: np.random.Generator) -> float:
        """Anywhere; where RWKV-7 blocks read in pieces, preferably whole in one before the last."""
        depth, size = float(rng.random()), wanted.recurrent_length
        last = wanted.length // size - 1 if size else 0
        for _ in range(16 if last else 0):
            start = self.builder.prefix_length(length, depth)
            first, end = (x // size for x in (start, start + needle))
            if first == end < last:
                break
            depth = float(rng.random())
        return depth


def _random_key(rng: np.random.Generator) -> int:
    """Half as the evaluation draws them; half with repeated digits, which are harder to copy.

    All are about as long as those asked: ending early must not be a good guess.
    """
    if rng.random() < 0.5:
        return int(rng.integers(1, 50_001))
    digits = rng.choice(10, size=int(rng.integers(1, 4)), replace=False)
    text = "".join(str(digits[i]) for i in rng.integers(0, len(digits), size=rng.integers(4, 6)))
    return max(1, int(text))
