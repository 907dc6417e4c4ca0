"""RWKV's World tokenizer: greedy longest match on bytes, vocabulary of 2023-04-24.

The vocabulary and the matching of valid UTF-8 come from the package `pyrwkv-tokenizer` (Rust,
tens of MB/s). It takes only ``str``, and its decoder aborts on anything that is no UTF-8, so byte
strings that are no UTF-8 are matched here and every decoding happens here.
"""

import ast
from functools import lru_cache
from typing import Any

from pyrwkv_tokenizer import RWKVTokenizer

from rwkvx.errors import InputError
from rwkvx.tokenizers.base import ExactTokenizer

__all__ = ["END_OF_TEXT", "WorldTokenizer"]

END_OF_TEXT = "<|rwkv_tokenizer_end_of_text|>"  # how Hugging Face conversions of RWKV name id 0
_SLOTS = 65536  # rows of the embedding; 65,529 of them stand for bytes


class _Vocabulary:
    """The World vocabulary: id to bytes, and greedy longest match for any byte string."""

    def __init__(self) -> None:
        self.rust = RWKVTokenizer()
        with open(self.rust.vocab_filepath, encoding="utf-8") as file:
            # One line an entry: id, a Python literal (str or bytes), length in bytes. The literal
            # may hold spaces, so it is what stands between the first and the last one.
            rows = [line.rstrip("\n") for line in file]
        literals = [row[row.index(" ") + 1 : row.rindex(" ")] for row in rows]
        table = [b""] * _SLOTS
        # One parse of all literals at once: fifteen times quicker than one by one.
        for row, value in zip(rows, ast.literal_eval(f"[{','.join(literals)}]"), strict=True):
            entry = value.encode("utf-8") if isinstance(value, str) else value
            number, length = int(row[: row.index(" ")]), int(row[row.rindex(" ") :])
            if len(entry) != length or not 0 < number < _SLOTS:
                raise InputError(f"{self.rust.vocab_filepath}: broken entry {row!r}")
            table[number] = entry
        self.table = tuple(table)
        self.named = (END_OF_TEXT.encode(), *self.table[1:])
        self.ids = {entry: i for i, entry in enumerate(table) if entry}
        # Lengths to try, longest first, by the first two bytes: a bounded number of look-ups per
        # token, so matching is linear in the length of the text.
        lengths: dict[bytes, set[int]] = {}
        for entry in self.ids:
            if len(entry) > 1:
                lengths.setdefault(entry[:2], set()).add(len(entry))
        self.lengths = {key: tuple(sorted(ls, reverse=True)) for key, ls in lengths.items()}

    def match(self, data: bytes) -> list[int]:
        """Ids of `data` by greedy longest match, for any bytes."""
        ids, lengths, out, at = self.ids, self.lengths, [], 0
        while at < len(data):
            for length in lengths.get(data[at : at + 2], ()):
                # A slice cut short by the end of the data still is right: it is all that is left.
                token = ids.get(data[at : at + length])
                if token is not None:
                    break
            else:
                token, length = ids[data[at : at + 1]], 1
            out.append(token)
            at += length
        return out


@lru_cache(maxsize=1)
def _vocabulary() -> _Vocabulary:
    # Shared by all instances and kept out of them: the Rust object cannot be pickled, and
    # tokenizers are (data loaders, `datasets.map`).
    return _Vocabulary()


@lru_cache(maxsize=1)
def _token_ids() -> dict[str, int]:
    """Token string to id for all slots, as Hugging Face's methods show them."""
    table = _vocabulary().table
    names = {entry.decode("latin-1") or f"<|unused_{i}|>": i for i, entry in enumerate(table)}
    del names["<|unused_0|>"]
    return {END_OF_TEXT: 0, **names}


class WorldTokenizer(ExactTokenizer):
    """RWKV World: 65,536 slots, id 0 ends a document (and begins and pads), 65,530 and up unused.

    ``decode`` writes id 0 as its name unless ``skip_special_tokens``; ``decode_bytes`` leaves it
    out, as it stands for no bytes. (The NUL *byte* is id 1.)
    """

    def __init__(self, **kwargs: Any) -> None:
        for name in ("bos_token", "eos_token", "pad_token"):
            kwargs.setdefault(name, END_OF_TEXT)
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        return _SLOTS

    def match_text(self, text: str) -> list[int]:
        ids: list[int] = _vocabulary().rust.encode(text)
        return ids

    def match_bytes(self, data: bytes) -> list[int]:
        return _vocabulary().match(data)

    def token_bytes(self) -> tuple[bytes, ...]:
        return _vocabulary().table

    def token_names(self) -> tuple[bytes, ...]:
        return _vocabulary().named

    def get_vocab(self) -> dict[str, int]:
        own = _token_ids()
        return {**own, **{t: i for t, i in self._added_tokens_encoder.items() if t not in own}}

    def _convert_token_to_id(self, token: str) -> int | None:
        return _token_ids().get(token)

    def _name_of(self, index: int) -> str:
        return END_OF_TEXT if index == 0 else super()._name_of(index)
