"""Small Hugging Face tokenizers that merge in different ways, trained on the spot."""

from __future__ import annotations

import string

from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
TEXT = [
    f"{NOISE}\n{NOISE}\n {NOISE} {NOISE}",
    "One of the special magic numbers for brave-otter is: 1234567.\nWhat is the special magic "
    "number for calm-river mentioned in the provided text? The special magic number is 7654321.",
    'User: Write a poem about rain.\n\nAssistant: "It rains," she said; and so it did.\n\n',
    "1. apple 2. stone 3. window 4. apple 5. river 6. table [23, 45, 67, 89, 20, 31]",
    "cfcd208495 -> c4ca4238a0\nc81e728d9d -> cfcd208495\n" * 3,
    '{"a54e2eed-e625-4570-9f74-3624e77d6684": "d1ff29be-4e2a-4208-a182-0cea716be3d4",\n "9f4a92b9"',
]


def words() -> PreTrainedTokenizerFast:
    """Like GPT-2's: bytes, words with the space before them, nothing across them."""
    made = Tokenizer(BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return _trained(made, 500, pre_tokenizers.ByteLevel.alphabet())


def across() -> PreTrainedTokenizerFast:
    """Bytes, merged over spaces and line breaks too: a token may hold the ends of two lines."""
    made = Tokenizer(BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return _trained(made, 380, pre_tokenizers.ByteLevel.alphabet())


def marked() -> PreTrainedTokenizerFast:
    """Like Llama's: a space before every text, byte fall-back, a token that begins every text."""
    made = Tokenizer(BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", *(f"<0x{number:02X}>" for number in range(256))]
    alphabet = ["▁", *string.ascii_letters, *string.digits, *string.punctuation]
    _trained(made, 800, alphabet, special)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", unk_token="<unk>")


def _trained(
    made: Tokenizer, size: int, alphabet: list[str], special: list[str] | None = None
) -> PreTrainedTokenizerFast:
    trainer = BpeTrainer(
        vocab_size=size,
        initial_alphabet=alphabet,
        special_tokens=special or [],
        show_progress=False,
    )
    made.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made)
