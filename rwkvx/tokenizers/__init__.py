"""Tokenizers: RWKV World and plain bytes, both behind Hugging Face's tokenizer class.

Both read and write **every** byte string exactly: ``decode_bytes(encode_bytes(b)) == b``.
Id 0 ends a document in both.
"""

from rwkvx.errors import InputError
from rwkvx.tokenizers.base import ExactTokenizer
from rwkvx.tokenizers.byte import ByteTokenizer
from rwkvx.tokenizers.world import WorldTokenizer

__all__ = ["TOKENIZERS", "ByteTokenizer", "ExactTokenizer", "WorldTokenizer", "get_tokenizer"]

TOKENIZERS: dict[str, type[ExactTokenizer]] = {"world": WorldTokenizer, "bytes": ByteTokenizer}


def get_tokenizer(name: str | None) -> ExactTokenizer:
    """A new tokenizer by its name in a model's configuration: ``"world"`` or ``"bytes"``.

    Raises InputError for any other name, and for None.
    """
    if name is None:
        raise InputError("this model names no tokenizer for its vocabulary: it reads ids only")
    if name not in TOKENIZERS:
        raise InputError(f"unknown tokenizer {name!r}: choose from {', '.join(sorted(TOKENIZERS))}")
    return TOKENIZERS[name]()
