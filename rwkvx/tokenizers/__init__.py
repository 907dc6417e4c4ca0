"""Tokenizers: RWKV World, plain bytes, and any `tokenizer.json`, all Hugging Face's classes.

World and bytes read and write **every** byte string exactly:
``decode_bytes(encode_bytes(b)) == b``. Id 0 ends a document in both, and in those trained here.
"""

from pathlib import Path
from typing import Any

from rwkvx.config import TOKENIZER_FILE
from rwkvx.errors import InputError
from rwkvx.tokenizers.base import ExactTokenizer
from rwkvx.tokenizers.byte import ByteTokenizer
from rwkvx.tokenizers.world import WorldTokenizer

__all__ = ["TOKENIZERS", "ByteTokenizer", "ExactTokenizer", "WorldTokenizer", "get_tokenizer"]

TOKENIZERS: dict[str, type[ExactTokenizer]] = {"world": WorldTokenizer, "bytes": ByteTokenizer}


def get_tokenizer(name: str | None) -> Any:
    """A new tokenizer: ``"world"``, ``"bytes"``, or the path of a folder with `tokenizer.json`.

    Raises InputError for any other name, for None, and for a file that is no tokenizer.
    """
    if name is None:
        raise InputError("this model names no tokenizer for its vocabulary: it reads ids only")
    if name in TOKENIZERS:
        return TOKENIZERS[name]()
    if name == TOKENIZER_FILE:
        raise InputError("this model's folder lacks its tokenizer.json: it reads ids only")
    if Path(name).exists():
        from rwkvx.tokenizers.file import read_tokenizer

        return read_tokenizer(name)
    known = ", ".join(sorted(TOKENIZERS))
    raise InputError(f"unknown tokenizer {name!r}: choose {known} or a folder with tokenizer.json")
