"""A `tokenizer.json`, by Hugging Face's own class, and a new one by byte-level BPE."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rwkvx.checkpoint.hub import TOKENIZER_EXTRAS
from rwkvx.config import TOKENIZER_CONFIG, TOKENIZER_JSON
from rwkvx.errors import InputError, one_line
from rwkvx.files import is_there, open_regular, read_mapping

__all__ = [
    "count_ids",
    "fingerprint",
    "from_folder",
    "read_tokenizer",
    "save_tokenizer",
    "train_bpe",
]

END_OF_DOCUMENT = "<|endoftext|>"  # id 0 of a tokenizer that is trained here


def read_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder, or of a `tokenizer.json` itself.

    Added tokens, special ones and the chat template are those of `tokenizer_config.json` beside
    it, too. Where that names no end of document, it is id 0, if that is a special token. Text that
    spells a special token stays text.

    Raises:
        InputError: no such file, damage, or no end of document.
    """
    path = Path(path).expanduser()
    folder = path if path.is_dir() else path.parent
    file = path / TOKENIZER_JSON if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{file} is missing: a folder with {TOKENIZER_JSON}, or that file itself")
    if file.name != TOKENIZER_JSON:
        raise InputError(f"{file}: a tokenizer's file is called {TOKENIZER_JSON}")
    tokenizer = from_folder(PreTrainedTokenizerFast, folder, split_special_tokens=True)
    return _with_end(tokenizer, file)


def from_folder(kind: type[PreTrainedTokenizerBase], folder: Path, **options: Any) -> Any:
    """A tokenizer of class `kind` as Hugging Face reads it from a folder: with the tokens that were
    added, special ones, and the chat template. No code in the folder is run.

    Raises:
        InputError: a file is damaged, or is no regular one.
    """
    there = [
        x for x in (TOKENIZER_JSON, TOKENIZER_CONFIG, *TOKENIZER_EXTRAS) if is_there(folder / x)
    ]
    files = [file for x in there for file in _files(folder / x)]
    for file in files:
        with open_regular(file):  # a pipe would be waited for
            pass
        if file.suffix == ".json" and file.name != TOKENIZER_JSON:
            read_mapping(file)
    try:
        tokenizer = kind.from_pretrained(folder, local_files_only=True, **options)
        tokenizer("a")  # some values are looked at only now
    except Exception as error:  # the library's own errors are plain Exceptions
        reason = one_line(str(error), 120)
        where = ", ".join(there)
        raise InputError(f"{folder} has a damaged tokenizer ({where}): {reason}") from error
    return tokenizer


def _files(path: Path) -> list[Path]:
    return sorted(path.glob("*.jinja")) if path.is_dir() else [path]


def _with_end(tokenizer: PreTrainedTokenizerFast, file: Path) -> PreTrainedTokenizerFast:
    """With an end of document, which also begins and pads where nothing else is named."""
    if tokenizer.eos_token_id is None:
        first = tokenizer.backend_tokenizer.get_added_tokens_decoder().get(0)
        if first is None or not first.special:
            raise InputError(
                f"{file} has no end of document: name it as eos_token in tokenizer_config.json"
            )
        tokenizer.eos_token = first.content
    for name in ("bos_token", "pad_token"):
        if getattr(tokenizer, name) is None:
            setattr(tokenizer, name, tokenizer.eos_token)
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[str]:
    """Write it as Hugging Face does, each file whole or not at all; the names of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".tokenizer.") as temporary:
        tokenizer.save_pretrained(temporary)
        names = sorted(p.name for p in Path(temporary).iterdir() if p.is_file())
        for name in names:
            shutil.move(Path(temporary) / name, folder / name)
    return names


def count_ids(tokenizer: Any) -> int:
    """Rows that an embedding needs: the largest id and one."""
    return max(tokenizer.get_vocab().values()) + 1


def fingerprint(tokenizer: Any) -> str:
    """SHA-256 of what makes ids out of text, hexadecimal: equal for equal ids only."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):  # vocabularies of bytes
        digest = hashlib.sha256(type(tokenizer).__name__.encode())
        for entry in tokenizer.token_bytes():
            digest.update(len(entry).to_bytes(4, "little") + entry)
        # A new one has those of its class only, which the vocabulary says already.
        if tokenizer.added_tokens != type(tokenizer)().added_tokens:
            digest.update(json.dumps(tokenizer.added_tokens).encode())
        return digest.hexdigest()
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    data = {name: x for name, x in data.items() if name not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def train_bpe(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `size` ids (GPT-2's way of cutting words); id 0 ends a document.

    Every text is read and written exactly: all 256 bytes are in the vocabulary.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if size <= len(alphabet):
        raise InputError(f"a byte-level vocabulary needs more than {len(alphabet)} ids, not {size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_DOCUMENT)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        **special,
    )
