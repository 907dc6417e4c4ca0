"""What the tokenizers share: Hugging Face's interface over an exact map of bytes to ids."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizer

from rwkvx.errors import InputError

__all__ = ["ExactTokenizer"]


class ExactTokenizer(PreTrainedTokenizer):
    """A Hugging Face tokenizer with a fixed vocabulary of byte strings.

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

    # ------------------------------------------------------------- what a subclass provides

    def encode_text(self, text: str) -> list[int]:
        """Ids of a text; InputError where it holds a lone surrogate (not a character)."""
        raise NotImplementedError

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of any byte string, valid UTF-8 or not; the inverse of `decode_bytes`."""
        raise NotImplementedError

    def token_bytes(self) -> Sequence[bytes]:
        """The bytes behind each id, ``vocab_size`` of them; empty where an id stands for none."""
        raise NotImplementedError

    # ------------------------------------------------------------- decoding

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Bytes of a sequence of ids (ints, or a 1-D tensor or array).

        Raises InputError for an id outside the vocabulary. Ids that stand for no bytes (the end
        of a document and unused slots, in the World vocabulary) add nothing.
        """
        return b"".join(map(self.token_bytes().__getitem__, self._checked(ids)))

    def _checked(self, ids: Any) -> list[int]:
        """`ids` as a list of ints inside the vocabulary."""
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        checked: list[int] = [ids] if isinstance(ids, int) else list(ids)
        # A negative id would silently count from the end of the table.
        if checked and (min(checked) < 0 or max(checked) >= self.vocab_size):
            bad = next(i for i in checked if not 0 <= i < self.vocab_size)
            raise InputError(f"token id {bad} is outside the vocabulary of {self.vocab_size}")
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
            data = self._bytes_with_names(ids)
        return data.decode("utf-8", errors="replace")

    def _bytes_with_names(self, ids: list[int]) -> bytes:
        """Bytes of checked ids, special tokens written as their names."""
        return self.decode_bytes(ids)

    # ------------------------------------------------------------- encoding

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

    def get_vocab(self) -> dict[str, int]:
        """Token string (bytes as Latin-1) to id, for every slot."""
        return {self._convert_id_to_token(i): i for i in range(self.vocab_size)}

    def _convert_id_to_token(self, index: int) -> str:
        (index,) = self._checked(index)
        return self.token_bytes()[index].decode("latin-1") or f"<|unused_{index}|>"

    def _convert_token_to_id(self, token: str) -> int | None:
        return self.get_vocab().get(token)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join token strings (bytes as Latin-1) into the text they spell."""
        return "".join(tokens).encode("latin-1").decode("utf-8", errors="replace")

    def _add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        for token in new_tokens or []:
            if str(token) not in self.get_vocab():
                raise InputError(f"token {str(token)!r} cannot be added: the vocabulary is fixed")
        return int(super()._add_tokens(new_tokens, special_tokens=special_tokens))

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


def utf8(text: str) -> bytes:
    """`text` in UTF-8; InputError with the position where it holds a lone surrogate."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"text holds a lone surrogate (U+{ord(text[error.start]):04X}) at character "
            f"{error.start}, which no UTF-8 text can hold"
        ) from None
