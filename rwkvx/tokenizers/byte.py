"""The byte tokenizer: 256 ids, each the byte itself."""

from typing import Any

from rwkvx.tokenizers.base import ExactTokenizer

__all__ = ["ByteTokenizer"]

_TABLE = tuple(bytes([i]) for i in range(256))


class ByteTokenizer(ExactTokenizer):
    """UTF-8 bytes as ids. Id 0, the NUL byte, also ends a document and pads."""

    def __init__(self, **kwargs: Any) -> None:
        for name in ("bos_token", "eos_token", "pad_token"):
            kwargs.setdefault(name, "\0")
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        return 256

    def match_text(self, text: str) -> list[int]:
        return list(text.encode())

    def match_bytes(self, data: bytes) -> list[int]:
        return list(data)

    def token_bytes(self) -> tuple[bytes, ...]:
        return _TABLE
