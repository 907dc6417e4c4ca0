"""Batches as a function of (seed, step): nothing to save for a resume, nothing repeats.

Axes: B batch, T time.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rwkvx.data.folder import data_folder
from rwkvx.data.passkey import Filler, Ids, PasskeyBuilder, standard_filler
from rwkvx.errors import InputError
from rwkvx.files import TEXT_BYTES, parse_json, read_lines, read_text, tar_members
from rwkvx.training.config import DataConfig, StageConfig


class Batch(NamedTuple):
    """Inputs, targets [B, T] int64; loss weights [B, T] float32; answer positions [B, T] bool."""

    inputs: Tensor
    targets: Tensor
    weights: Tensor
    answers: Tensor


class Source(Protocol):
    """Gives batches; equal arguments give equal batches."""

    def batch(self, stage: StageConfig, seed: tuple[int, ...]) -> Batch: ...

    def evaluations(self, stage: StageConfig) -> dict[str, StageConfig]:
        """What to evaluate on beside training with `stage`, by name."""
        ...


def build_source(config: DataConfig, tokenizer: Any, data: str | None = None) -> Source:
    """The source that `config` names; text is read and tokenised once, here."""
    if config.kind == "hub":
        return TextSource(_hub_tokens(config, tokenizer))
    tokens = read_tokens(config, tokenizer, data) if config.paths else None
    if config.kind == "passkey":
        return PasskeySource(config, tokenizer, tokens)
    if tokens is None:
        raise InputError("data.paths names no text file")
    return TextSource(tokens)


class TextSource:
    """Random windows of documents that stand one after the other, each ended by token 0."""

    def __init__(self, tokens: NDArray[np.int32]) -> None:
        self.tokens = tokens

    def batch(self, stage: StageConfig, seed: tuple[int, ...]) -> Batch:
        """Windows of `stage.length` + 1 tokens; every token counts alike."""
        if len(self.tokens) <= stage.length:
            raise InputError(
                f"the text has {len(self.tokens)} tokens, a sequence needs {stage.length + 1}"
            )
        rng = np.random.default_rng(seed)
        starts = rng.integers(0, len(self.tokens) - stage.length, size=stage.batch)
        rows = np.stack([self.tokens[s : s + stage.length + 1] for s in starts]).astype(np.int64)
        ids = torch.from_numpy(rows)
        weights = torch.full((stage.batch, stage.length), 1.0 / (stage.batch * stage.length))
        return Batch(ids[:, :-1], ids[:, 1:], weights, torch.zeros_like(weights, dtype=torch.bool))

    def evaluations(self, stage: StageConfig) -> dict[str, StageConfig]:
        """The same as training."""
        return {"eval": stage}


class PasskeySource:
    """Passkey prompts with their answers; filler of standard sentences or random prose."""

    def __init__(self, config: DataConfig, tokenizer: Any, prose: NDArray[np.int32] | None) -> None:
        if config.prose > 0 and prose is None:
            raise InputError("data.prose > 0 needs data.paths with prose")
        self.config, self.builder, self.prose = config, PasskeyBuilder(tokenizer), prose
        self.standard, self.vocab_size = standard_filler(tokenizer), int(tokenizer.vocab_size)

    def batch(self, stage: StageConfig, seed: tuple[int, ...]) -> Batch:
        """One prompt a row, its last tokens padded with the end of document."""
        rng = np.random.default_rng(seed)
        ids = np.zeros((stage.batch, stage.length + 1), dtype=np.int64)
        answers = np.zeros((stage.batch, stage.length), dtype=bool)
        used = np.zeros((stage.batch, stage.length), dtype=bool)
        for row in range(stage.batch):
            tokens, asked = self._sample(stage, rng)
            ids[row, : len(tokens)] = tokens
            answers[row, : len(tokens) - 1] = asked[1:]
            used[row, : len(tokens) - 1] = True
        whole = torch.from_numpy(ids)
        right, other = torch.from_numpy(answers), torch.from_numpy(used & ~answers)
        weights = right / right.sum() + self.config.other_weight * other / other.sum()
        return Batch(whole[:, :-1], whole[:, 1:], weights.float(), right)

    def evaluations(self, stage: StageConfig) -> dict[str, StageConfig]:
        """Each kind of filler alone."""
        kinds = {"standard": 0.0} if self.prose is None else {"standard": 0.0, "prose": 1.0}
        return {name: replace(stage, prose=share) for name, share in kinds.items()}

    def _sample(self, stage: StageConfig, rng: np.random.Generator) -> tuple[Ids, NDArray[np.bool]]:
        """At most T + 1 tokens, prompt and answer, any alignment to chunks; where answers stand."""
        room, key = stage.length + 1, _random_key(rng)
        answer = self.builder.answer(key)
        longest = room - len(answer)
        if longest < self.builder.minimum:
            raise InputError(
                f"a passkey sequence of {room - 1} tokens is too short: prompt and answer need "
                f"{self.builder.minimum + len(answer) - 1} with this tokenizer"
            )
        shortest = max(self.builder.minimum, longest - 64)
        length = int(rng.integers(shortest, max(shortest, longest) + 1))
        depth = self._depth(stage, length, len(self.builder.needle(key)), rng)
        filler, offset = self._filler(stage, room, rng)
        prompt = self.builder.build(filler, length, depth, key, offset=offset)
        tokens = np.concatenate([prompt.ids, answer])
        asked = np.arange(len(tokens)) >= length
        self._ask_again(stage, tokens, asked, prompt.needle_start, key, rng)
        return tokens, asked

    def _filler(
        self, stage: StageConfig, room: int, rng: np.random.Generator
    ) -> tuple[Filler, int]:
        """Prose or the standard sentences, and where to start in them."""
        prose = stage.prose if stage.prose >= 0 else self.config.prose
        if rng.random() < prose:
            if self.prose is None:
                raise InputError("prose > 0 in a stage needs data.paths with prose")
            if len(self.prose) <= room:
                raise InputError(
                    f"the prose of data.paths has {len(self.prose)} tokens, a passkey sequence "
                    f"needs more than {room}"
                )
            start = int(rng.integers(0, len(self.prose) - room))
            window = self.prose[start : start + room].astype(np.int64)
            if stage.noise:
                replaced = rng.random(room) < rng.random() * stage.noise
                window[replaced] = rng.integers(1, self.vocab_size, size=int(replaced.sum()))
            for _ in range(rng.poisson(rng.random() * stage.numbers * room / 1000)):
                number = self.builder.encode(f" {rng.integers(1, 10 ** rng.integers(1, 6))}. ")
                start = int(rng.integers(0, room - len(number)))
                window[start : start + len(number)] = number
            return Filler("prose", np.empty(0, np.int64), window), 0
        offset = int(rng.integers(0, 2 * self.standard.natural_length)) if rng.random() < 0.5 else 0
        return self.standard, offset

    def _ask_again(
        self,
        stage: StageConfig,
        tokens: Ids,
        asked: NDArray[np.bool],
        needle_start: int,
        key: int,
        rng: np.random.Generator,
    ) -> None:
        """Question and answer also in pieces between the needle's and the last, in the filler."""
        size, question = stage.recurrent_length, self.builder.question
        answer = self.builder.answer(key)[:-1]  # the text goes on
        inserted = np.concatenate([question, answer])
        first = (needle_start + len(self.builder.needle(key))) // size + 1 if size else stage.pieces
        for piece in range(first, stage.pieces - 1):
            if len(inserted) > size or rng.random() >= self.config.ask_again:
                continue
            start = piece * size + int(rng.integers(0, size - len(inserted) + 1))
            tokens[start : start + len(inserted)] = inserted
            asked[start + len(question) : start + len(inserted)] = True

    def _depth(
        self, stage: StageConfig, length: int, needle: int, rng: np.random.Generator
    ) -> float:
        """Anywhere; where RWKV-7 blocks read in pieces, preferably whole in one before the last."""
        depth, last = float(rng.random()), stage.pieces - 1
        for _ in range(16 if last else 0):
            start = self.builder.prefix_length(length, depth)
            first, end = (x // stage.recurrent_length for x in (start, start + needle))
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


def read_tokens(config: DataConfig, tokenizer: Any, data: str | None) -> NDArray[np.int32]:
    """All text of `config.paths`, tokenised: int32 [tokens], each document ended by token 0."""
    folder = data_folder(data)
    parts: list[NDArray[np.int32]] = []
    room = int(config.limit_mb * 1e6)
    for name in config.paths:
        path = Path(name)
        if not path.is_absolute() and not path.exists() and folder is not None:
            path = folder / name
        if not path.exists():
            raise InputError(
                f"text {name} is not there: name the data folder with --data or RWKVX_DATA"
            )
        for document in _documents(path, max(room, TEXT_BYTES)):
            if room <= 0:
                break
            ids = tokenizer.encode(document, add_special_tokens=False)
            parts.append(np.asarray([*ids, tokenizer.eos_token_id], dtype=np.int32))
            room -= len(document.encode())
    if not parts:
        raise InputError(f"no text in {', '.join(config.paths)}")
    return np.concatenate(parts)


def _documents(path: Path, most: int) -> Any:
    """The documents of one file, one after the other; of at most `most` bytes together."""
    try:
        if path.name.endswith((".tar.xz", ".tar.gz", ".tar.bz2", ".tar")):
            for _, data in tar_members(path, (".txt", ".md"), most):
                yield data.decode("utf-8", errors="replace")
        elif ".jsonl" in path.suffixes:
            for number, line in enumerate(read_lines(path, most), start=1):
                if line.strip():
                    yield _text_field(line, f"{path}, line {number}")
        else:
            yield read_text(path, most)
    except InputError as error:
        raise InputError(f"cannot read text: {error}") from error


def _text_field(line: str, where: str) -> str:
    try:
        text = parse_json(line, where)["text"]
    except (InputError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise InputError(f'{where}: no JSON object with a "text" field')
    return text


def _hub_tokens(config: DataConfig, tokenizer: Any) -> NDArray[np.int32]:
    """A Hugging Face data set with a "text" column."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError("data.kind: hub needs `pip install rwkvx[train]`") from error
    if not config.paths:
        raise InputError(
            "data.paths names no data set: give its name, and its subset if it has any"
        )
    parts, room = [], int(config.limit_mb * 1e6)
    for item in load_dataset(*config.paths, split=config.split, streaming=True):
        if not isinstance(item.get("text"), str):
            raise InputError(f'the data set {config.paths[0]} has no "text" column')
        ids = tokenizer.encode(item["text"], add_special_tokens=False)
        parts.append(np.asarray([*ids, tokenizer.eos_token_id], dtype=np.int32))
        room -= len(item["text"].encode())
        if room <= 0:
            break
    if not parts:
        raise InputError(f"the data set {config.paths[0]} is empty")
    return np.concatenate(parts)
