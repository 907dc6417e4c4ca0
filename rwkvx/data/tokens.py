"""A file of tokens: text that was tokenised once, mapped into memory by every run.

It is a safetensors file: `tokens` [N] uint16 or uint32, the documents one after the other, each
ended by the tokenizer's end of document; `documents` [D + 1] int64, where each begins. What it was
made with stands in its header.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from rwkvx.errors import InputError
from rwkvx.files import replacing
from rwkvx.tokenizers.file import count_ids, fingerprint

__all__ = ["TokenFile", "open_tokens", "write_tokens"]

HEADER_BYTES = 4096  # room that is left for the header, whose numbers are known at the end
FORMAT = "rwkvx-tokens-1"
_DTYPES: dict[str, np.dtype[Any]] = {"U16": np.dtype(np.uint16), "U32": np.dtype(np.uint32)}


class TokenFile(NamedTuple):
    """What a token file holds.

    tokens: [N] uint16 or uint32, mapped; documents: [D + 1] int64 offsets; training: the tokens
    before the held-out tail, which neither training nor a vocabulary trained with it has seen;
    name: equal for equal tokens.
    """

    tokens: NDArray[Any]
    documents: NDArray[np.int64]
    training: int
    name: str


def open_tokens(path: Path, tokenizer: Any) -> TokenFile:
    """Map a token file.

    Raises:
        InputError: no such file, damage, or one that was made with another tokenizer.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing: `rwkvx tokenize` writes it")
    try:
        with safe_open(path, framework="np") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT:
                raise InputError(f"{path} is no file of tokens: `rwkvx tokenize` writes one")
            documents = file.get_tensor("documents")
            part = file.get_slice("tokens")
            (count,), dtype = part.get_shape(), _DTYPES[part.get_dtype()]
        made_with, source, training = about["tokenizer"], about["source"], int(about["training"])
        rising = documents[0] == 0 and (np.diff(documents) > 0).all()
        if not (rising and documents[-1] == count and 0 <= training <= count):
            raise ValueError("its documents do not fill it")
    except (SafetensorError, OSError, KeyError, ValueError, IndexError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is no file of tokens, or is damaged: {error}") from error
    if made_with != fingerprint(tokenizer):
        name = about.get("tokenizer_name", "unknown")
        raise InputError(f"{path} was made with another tokenizer ({name})")
    with path.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
    tokens = np.memmap(path, dtype, "r", offset=8 + header, shape=(count,))
    return TokenFile(tokens, documents, training, f"{source} by {made_with}")


def write_tokens(
    path: Path,
    documents: Iterable[tuple[str, bool]],
    tokenizer: Any,
    processes: int = 1,
    **about: str,
) -> TokenFile:
    """Tokenise documents into a file, complete or not there at all.

    Args:
        documents: texts, and whether they are held out; those that are come last.
        processes: that tokenise; the file is the same for any number.
        about: more to be written into the header.

    Raises:
        InputError: no documents.
    """
    dtype = np.dtype(np.uint16 if count_ids(tokenizer) <= 1 << 16 else np.uint32)
    source, offsets, training = hashlib.sha256(), [0], 0
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(b" " * HEADER_BYTES)
        for text, held_out, ids in _encoded(documents, tokenizer, processes):
            data = text.encode("utf-8")
            source.update(len(data).to_bytes(8, "little") + data)
            file.write(np.append(ids, tokenizer.eos_token_id).astype(dtype).tobytes())
            offsets.append(offsets[-1] + len(ids) + 1)
            training = training if held_out else offsets[-1]
        if len(offsets) == 1:
            raise InputError(f"no text to write into {path}")
        file.write(np.asarray(offsets, dtype=np.int64).tobytes())
        facts = {
            "format": FORMAT,
            "tokenizer": fingerprint(tokenizer),
            "source": source.hexdigest(),
            "training": str(training),
        }
        _write_header(file, {**about, **facts}, dtype, offsets)
    return open_tokens(path, tokenizer)


def _write_header(
    file: BinaryIO, about: dict[str, str], dtype: np.dtype[Any], offsets: list[int]
) -> None:
    """At the start of the file, filled up with spaces as the format allows."""
    end = offsets[-1] * dtype.itemsize
    name = next(name for name, known in _DTYPES.items() if known == dtype)
    header = {
        "__metadata__": about,
        "tokens": {"dtype": name, "shape": [offsets[-1]], "data_offsets": [0, end]},
        "documents": {
            "dtype": "I64",
            "shape": [len(offsets)],
            "data_offsets": [end, end + 8 * len(offsets)],
        },
    }
    text = json.dumps(header).encode().ljust(HEADER_BYTES - 8)
    assert len(text) == HEADER_BYTES - 8
    file.seek(0)
    file.write(len(text).to_bytes(8, "little") + text)


_tokenizer: Any = None  # of a process that tokenises


def _use(tokenizer: Any) -> None:
    global _tokenizer
    _tokenizer = tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallel part


def _encode(text: str) -> NDArray[np.uint32]:
    return np.asarray(_tokenizer.encode(text, add_special_tokens=False), dtype=np.uint32)


def _encoded(
    documents: Iterable[tuple[str, bool]], tokenizer: Any, processes: int
) -> Iterator[tuple[str, bool, NDArray[np.uint32]]]:
    """Texts with their ids, in order."""
    if processes == 1:
        _use(tokenizer)
        yield from ((text, held_out, _encode(text)) for text, held_out in documents)
        return
    waiting: deque[tuple[str, bool, Future[NDArray[np.uint32]]]] = deque()
    with ProcessPoolExecutor(processes, get_context("spawn"), _use, (tokenizer,)) as pool:
        for text, held_out in documents:
            waiting.append((text, held_out, pool.submit(_encode, text)))
            if len(waiting) > 4 * processes:  # not the whole corpus at once
                text, held_out, done = waiting.popleft()
                yield text, held_out, done.result()
        while waiting:
            text, held_out, done = waiting.popleft()
            yield text, held_out, done.result()
