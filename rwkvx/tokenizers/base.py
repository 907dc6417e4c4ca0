"""What the tokenizers share: Hugging Face's interface over an exact map of bytes to ids."""

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from transformers import AddedToken, BatchEncoding, PreTrainedTokenizer

from rwkvx.errors import InputError, shown

__all__ = ["ExactTokenizer"]

_OPTIONS = (  # of Hugging Face's, which `save_pretrained` keeps
    "chat_template",
    "model_max_length",
    "padding_side",
    "split_special_tokens",
    "truncation_side",
)


class ExactTokenizer(PreTrainedTokenizer):
    """A Hugging Face tokenizer over a vocabulary of byte strings, to which tokens can be added.

    A subclass gives the ids of a text, the ids of a byte string, and the bytes behind each id;
    padding, truncation, batches, ``save_pretrained`` and ``from_pretrained`` come from Hugging
    Face. Texts go to ids in one step instead of through a list of token strings, which is what
    makes megabytes quick.

    The *token strings* that Hugging Face's methods show (``tokenize``, ``get_vocab``) write each
    byte as the Latin-1 character of the same number: one string per byte string, also for bytes
    that are no UTF-8.

    Text that happens to spell the name of a special token stays text, unless the caller passes
    ``split_special_tokens=False``.
    """

    model_input_names: list[str] = ["input_ids", "attention_mask"]  # noqa: RUF012 (Hugging Face's)
    vocab_files_names: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("split_special_tokens", True)
        super().__init__(**kwargs)
        self._check_added()

    # ------------------------------------------------------------- what a subclass provides

    def match_text(self, text: str) -> list[int]:
        """Ids of a text that holds no added token, in the vocabulary that there was at first."""
        raise NotImplementedError

    def match_bytes(self, data: bytes) -> list[int]:
        """The same for any byte string, valid UTF-8 or not."""
        raise NotImplementedError

    def token_bytes(self) -> Sequence[bytes]:
        """The bytes behind each id, ``vocab_size`` of them; empty where an id stands for none."""
        raise NotImplementedError

    def token_names(self) -> Sequence[bytes]:
        """As `token_bytes`, special tokens by their names."""
        return self.token_bytes()

    # ------------------------------------------------------------- decoding

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Bytes of a sequence of ids (ints, or a 1-D tensor or array).

        Raises InputError for an id outside the vocabulary. Ids that stand for no bytes (the end
        of a document and unused slots, in the World vocabulary; special tokens that were added)
        add nothing.
        """
        return self._joined(self._checked(ids), self.token_bytes(), named=False)

    def _joined(self, ids: list[int], table: Sequence[bytes], named: bool) -> bytes:
        """Bytes of checked ids; special tokens that were added by their names, or as nothing."""
        size = self.vocab_size
        added = {i: t for i, t in self._added_tokens_decoder.items() if i >= size or not table[i]}
        grown = {i: utf8(t.content) for i, t in added.items() if named or not t.special}
        if not grown and len(self) == size:
            return b"".join(map(table.__getitem__, ids))
        return b"".join((table[i] if i < size else b"") or grown.get(i, b"") for i in ids)

    def _checked(self, ids: Any) -> list[int]:
        """`ids` as a list of ints inside the vocabulary."""
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        checked: list[int] = [ids] if isinstance(ids, int) else list(ids)
        # A negative id would silently count from the end of the table.
        if checked and (min(checked) < 0 or max(checked) >= len(self)):
            bad = next(i for i in checked if not 0 <= i < len(self))
            raise InputError(f"token id {bad} is outside the vocabulary of {len(self)}")
        return checked

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD (``decode_bytes`` keeps them)."""
        ids = self._checked(token_ids)
        if skip_special_tokens:
            special = set(self.all_special_ids)
            data = self.decode_bytes([i for i in ids if i not in special])
        else:
            data = self._joined(ids, self.token_names(), named=True)
        return data.decode("utf-8", errors="replace")

    # ------------------------------------------------------------- encoding

    def encode_text(self, text: str) -> list[int]:
        """Ids of a text; InputError where it holds a lone surrogate (not a character)."""
        utf8(text)
        tokens = self._plain_added()
        if not tokens:
            return self.match_text(text)
        ids, at = [], 0
        for found in _splitter(tokens).finditer(text):
            ids += self.match_text(text[at : found.start()]) if found.start() > at else []
            ids.append(self._added_tokens_encoder[tokens[cast(int, found.lastindex) - 1][0]])
            at = found.end()
        return ids + self.match_text(text[at:])

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of any byte string, valid UTF-8 or not; the inverse of `decode_bytes`."""
        try:
            return self.encode_text(data.decode("utf-8"))
        except UnicodeDecodeError:
            pass
        if not (tokens := self._plain_added()):
            return self.match_bytes(data)
        names = b"|".join(re.escape(utf8(content)) for content, *_ in tokens)
        ids: list[int] = []
        for i, part in enumerate(re.split(b"(" + names + b")", data)):
            added = i % 2 == 1
            ids += [self._added_tokens_encoder[part.decode()]] if added else self.match_bytes(part)
        return ids

    def _plain_added(self) -> tuple[tuple[str, bool, bool, bool], ...]:
        """Added tokens that are not special, which every text is cut at; the longest first."""
        added = (t for t in self._added_tokens_decoder.values() if not t.special)
        found = ((t.content, t.lstrip, t.rstrip, t.single_word) for t in added)
        return tuple(sorted(found, key=lambda token: -len(token[0])))

    def _encode_plus(self, text: Any, text_pair: Any = None, **kwargs: Any) -> BatchEncoding:
        """Replace every text by its ids first; Hugging Face's own code takes ids as they are."""
        keep_special = kwargs.get("split_special_tokens", self.split_special_tokens)
        plain = not kwargs.get("is_split_into_words") and not kwargs.get("sanitize_control_tokens")
        if keep_special and plain:
            text, text_pair = self._ids_of(text), self._ids_of(text_pair)
        return super()._encode_plus(text, text_pair=text_pair, **kwargs)

    def _ids_of(self, text: Any) -> Any:
        """`text` with each string in it replaced by its ids, lists and tuples kept."""
        if isinstance(text, str):
            # An empty list would be read as an empty batch.
            return self.encode_text(text) if text else text
        if isinstance(text, (list, tuple)) and any(isinstance(x, (str, list, tuple)) for x in text):
            return type(text)(self._ids_of(part) for part in text)
        return text

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [self._convert_id_to_token(i) for i in self.encode_text(text)]

    # ------------------------------------------------------------- vocabulary

    def __len__(self) -> int:
        """The largest id, of the vocabulary or of an added token, and one: rows that a model's
        embedding must have."""
        return max([self.vocab_size, *(i + 1 for i in self._added_tokens_decoder)])

    @property
    def added_tokens(self) -> list[tuple[Any, ...]]:
        """Id, text, special, lstrip, rstrip and single_word of each added token, by id."""
        return [
            (i, t.content, t.special, t.lstrip, t.rstrip, t.single_word)
            for i, t in sorted(self._added_tokens_decoder.items())
        ]

    @property
    def is_customised(self) -> bool:
        """Whether it differs from a new one of its class: in its tokens, their parts, or in what
        Hugging Face's methods do with texts."""

        def about(tokenizer: ExactTokenizer) -> list[Any]:
            names = ("added_tokens", "special_tokens_map", *_OPTIONS)
            return [getattr(tokenizer, name) for name in names]

        return about(self) != about(type(self)())

    def _check_added(self) -> None:
        """Refuse added tokens, read from a folder, that no text could come back from."""
        table = self.token_bytes()
        for i, token in self._added_tokens_decoder.items():
            own = table[i] if 0 <= i < self.vocab_size else b""
            if i < 0 or not token.content or (own and own != utf8(token.content)):
                raise InputError(f"id {i} cannot be that of the added token {shown(token.content)}")

    def get_vocab(self) -> dict[str, int]:
        """Token string (bytes as Latin-1) to id for every slot; added tokens as they are."""
        own = {self._name_of(i): i for i in range(self.vocab_size)}
        return {**own, **{t: i for t, i in self._added_tokens_encoder.items() if t not in own}}

    def _name_of(self, index: int) -> str:
        """Token string of an id of the vocabulary that there was at first."""
        name = "" if self._is_new(index) else self.token_bytes()[index].decode("latin-1")
        return name or f"<|unused_{index}|>"

    def _convert_id_to_token(self, index: int) -> str:
        (index,) = self._checked(index)
        if index in self._added_tokens_decoder and self._is_new(index):
            return str(self._added_tokens_decoder[index].content)
        return self._name_of(index)

    def _is_new(self, index: int) -> bool:
        """Whether an id stands for nothing in the vocabulary that there was at first."""
        return index >= self.vocab_size or not self.token_bytes()[index]

    def _convert_token_to_id(self, token: str) -> int | None:
        return self.get_vocab().get(token)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join token strings (bytes as Latin-1, added tokens as written) into the text of them."""
        new = {t for t, i in self._added_tokens_encoder.items() if self._is_new(i)}
        data = (utf8(t) if t in new else t.encode("latin-1") for t in tokens)
        return b"".join(data).decode("utf-8", errors="replace")

    def add_special_tokens(self, special_tokens_dict: Any, *args: Any, **kwargs: Any) -> int:
        """As Hugging Face's; what is refused (InputError) changes nothing."""
        lists = ("extra_special_tokens", "additional_special_tokens")
        for name, value in (special_tokens_dict or {}).items():
            if name not in (*self.SPECIAL_TOKENS_ATTRIBUTES, *lists):
                raise InputError(f"there is no special token {shown(name)}")
            for token in value if isinstance(value, list | tuple) else [value]:
                _check_new(token)
        return int(super().add_special_tokens(special_tokens_dict, *args, **kwargs))

    def _add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Add what has no id yet, at the end; what has one keeps it, and texts are cut at it.

        A token that is added to the vocabulary needs a row of the model's embedding:
        ``model.resize_token_embeddings(len(tokenizer))``.
        """
        new, before = list(new_tokens or []), len(self)
        for token in new:
            _check_new(token)
        for token in new:
            special = special_tokens or getattr(token, "special", False)
            special = special or str(token) in self.all_special_tokens
            if isinstance(token, str):
                token = AddedToken(token, normalized=False, special=special)
            elif special_tokens:
                token.special = True
            if not token.content or token.content in self._added_tokens_encoder:
                continue
            index = self._convert_token_to_id(utf8(token.content).decode("latin-1"))
            index = len(self) if index is None or index >= self.vocab_size else index
            self._added_tokens_decoder[index] = token
            self._added_tokens_encoder[token.content] = index
            if token.special and token.content not in self.all_special_tokens:
                self._extra_special_tokens.append(token)
        self._update_trie()
        self._update_total_vocab_size()
        return len(self) - before

    def _update_total_vocab_size(self) -> None:
        self.total_vocab_size = len(self)

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """The vocabulary comes with the installed packages: only the import of them is written."""
        from rwkvx.checkpoint.hub import write_code

        return (str(Path(save_directory) / write_code(Path(save_directory))),)

    @property
    def _auto_map(self) -> dict[str, Any]:
        from rwkvx.checkpoint.hub import tokenizer_auto_map

        return tokenizer_auto_map(type(self).__name__)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoTokenizer") -> None:
        """Nothing: a saved folder imports this package, no code is copied into it."""


@lru_cache(maxsize=16)
def _splitter(tokens: tuple[tuple[str, bool, bool, bool], ...]) -> re.Pattern[str]:
    """Finds added tokens (content, lstrip, rstrip, single_word), each in a group of its own."""
    parts = []
    for content, left, right, alone in tokens:
        word = rf"(?<!\w){re.escape(content)}(?!\w)" if alone else re.escape(content)
        before, after = (r"\s*" if strip else "" for strip in (left, right))
        parts.append(f"{before}({word}){after}")
    return re.compile("|".join(parts))


def _check_new(token: Any) -> None:
    """Refuse what cannot be a token."""
    if not isinstance(token, str | AddedToken):
        raise InputError(f"a token must be a text, got {shown(token)}")
    utf8(str(token))


def utf8(text: str) -> bytes:
    """`text` in UTF-8; InputError with the position where it holds a lone surrogate."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"text holds a lone surrogate (U+{ord(text[error.start]):04X}) at character "
            f"{error.start}, which no UTF-8 text can hold"
        ) from None
