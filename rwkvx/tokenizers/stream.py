"""Bytes of a prompt into ids, and ids into text as they come, for every kind of tokenizer."""

import codecs
from collections.abc import Iterable, Iterator
from typing import Any

from tokenizers.decoders import DecodeStream

from rwkvx.errors import InputError
from rwkvx.tokenizers.base import ExactTokenizer

__all__ = ["prompt_ids", "text_stream"]


def prompt_ids(tokenizer: Any, data: bytes) -> list[int]:
    """Ids of a prompt.

    Raises:
        InputError: bytes that are no UTF-8, for a tokenizer that reads text only.
    """
    if isinstance(tokenizer, ExactTokenizer):
        return tokenizer.encode_bytes(data)
    return list(tokenizer.encode(_text(data), add_special_tokens=False))


def text_stream(tokenizer: Any, prompt: bytes, tokens: Iterable[int]) -> Iterator[str]:
    """The prompt, then the text of every token, a character as soon as it is whole."""
    if isinstance(tokenizer, ExactTokenizer):
        utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        yield utf8.decode(prompt)
        for token in tokens:
            yield utf8.decode(tokenizer.decode_bytes([token]))
        yield utf8.decode(b"", final=True)
        return
    yield _text(prompt)
    stream = DecodeStream(prompt_ids(tokenizer, prompt), skip_special_tokens=True)
    whole = True
    for token in tokens:
        text = stream.step(tokenizer.backend_tokenizer, token)
        whole = text is not None
        yield text or ""
    if not whole:
        yield "\N{REPLACEMENT CHARACTER}"


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"the prompt is no UTF-8, which this tokenizer wants: {error}") from error
