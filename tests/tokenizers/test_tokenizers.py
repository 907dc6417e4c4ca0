"""Both tokenizers: exact on every byte string, at home in Hugging Face's interface, quick."""

import gzip
import os
import pickle
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvx.errors import InputError
from rwkvx.tokenizers import ByteTokenizer, ExactTokenizer, WorldTokenizer, get_tokenizer

NAMES = ["world", "bytes"]
TRICKY = [
    "",
    "\0",
    "a\0b",
    " ",
    "\n\n\n",
    "\r\n",
    "<|rwkv_tokenizer_end_of_text|>",
    "<|unused_65530|>",
    "naïve café 今天是美好的一天。 👩‍👩‍👧‍👦 \u202eabc\U0010ffff",
    " " * 1000,
]
GENERAL = settings(max_examples=200, deadline=None)


def tokenizers() -> dict[str, ExactTokenizer]:
    return {name: get_tokenizer(name) for name in NAMES}


TOKENIZERS = tokenizers()


@pytest.fixture(params=NAMES)
def tokenizer(request: pytest.FixtureRequest) -> ExactTokenizer:
    return TOKENIZERS[request.param]


@GENERAL
@given(data=st.binary(max_size=300))
def test_every_byte_string_comes_back(data: bytes) -> None:
    for tokenizer in TOKENIZERS.values():
        ids = tokenizer.encode_bytes(data)
        assert tokenizer.decode_bytes(ids) == data
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


@GENERAL
@given(text=st.text(max_size=300))
def test_every_text_comes_back(text: str) -> None:
    for tokenizer in TOKENIZERS.values():
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
        assert ids == tokenizer.encode_bytes(text.encode())
        assert ids == tokenizer(text)["input_ids"]
        if isinstance(tokenizer, WorldTokenizer):
            assert tokenizer.eos_token_id not in ids


@pytest.mark.parametrize("text", TRICKY)
def test_tricky_texts(tokenizer: ExactTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(text.encode())) == text.encode()


def test_token_strings_agree_with_ids(tokenizer: ExactTokenizer) -> None:
    text = "the naïve 今天 👍\0 end"
    tokens = tokenizer.tokenize(text)
    assert tokenizer.convert_tokens_to_ids(tokens) == tokenizer.encode(text)
    assert tokenizer.convert_tokens_to_string(tokens) == text
    assert len(tokenizer.get_vocab()) == len(tokenizer) == tokenizer.vocab_size
    assert sorted(tokenizer.get_vocab().values()) == list(range(tokenizer.vocab_size))


@pytest.mark.parametrize("surrogate", ["\ud800", "ab\udfffc"])
def test_lone_surrogates_are_refused(tokenizer: ExactTokenizer, surrogate: str) -> None:
    for encode in (tokenizer.encode, tokenizer, tokenizer.tokenize):
        with pytest.raises(InputError, match=r"lone surrogate \(U\+D"):
            encode(surrogate)


@pytest.mark.parametrize("bad", [-1, 65536, 2**40])
def test_ids_outside_the_vocabulary_are_refused(tokenizer: ExactTokenizer, bad: int) -> None:
    with pytest.raises(InputError, match=f"token id {bad} is outside the vocabulary"):
        tokenizer.decode_bytes([97, bad])
    with pytest.raises(InputError, match=f"token id {bad} is outside the vocabulary"):
        tokenizer.decode([97, bad])


def test_every_id_decodes(tokenizer: ExactTokenizer) -> None:
    ids = list(range(tokenizer.vocab_size))
    assert isinstance(tokenizer.decode(ids), str)
    assert tokenizer.decode(torch.tensor(ids)) == tokenizer.decode(ids)


def test_end_of_document() -> None:
    world, plain = TOKENIZERS["world"], TOKENIZERS["bytes"]
    for tokenizer in (world, plain):
        assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.pad_token_id == 0
    body = world.encode("hello")
    assert world.decode_bytes([*body, 0, *body]) == b"hellohello"
    assert world.decode([*body, 0]) == "hello<|rwkv_tokenizer_end_of_text|>"
    assert world.decode([*body, 0], skip_special_tokens=True) == "hello"
    assert plain.decode_bytes([104, 0]) == b"h\0"
    # Text stays text; only who asks for it gets the control token.
    assert 0 not in world.encode("<|rwkv_tokenizer_end_of_text|>")
    marked = "hello<|rwkv_tokenizer_end_of_text|>hello"
    assert world.encode(marked, split_special_tokens=False) == [*body, 0, *body]


def test_batches_are_padded(tokenizer: ExactTokenizer) -> None:
    texts = ["hi there, world", "", "x"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    assert batch["input_ids"].dtype == torch.int64
    for text, ids, mask in zip(texts, batch["input_ids"], batch["attention_mask"], strict=True):
        assert tokenizer.decode(ids[mask.bool()]) == text
        assert (ids[~mask.bool()] == 0).all()
    left = get_tokenizer("bytes" if isinstance(tokenizer, ByteTokenizer) else "world")
    left.padding_side = "left"
    assert left(texts, padding=True)["attention_mask"][2][-1] == 1
    cut = tokenizer(texts, truncation=True, max_length=2)["input_ids"]
    assert [len(ids) for ids in cut] == [2, 0, 1]
    assert tokenizer(["ab"], ["cd"])["input_ids"] == [tokenizer.encode("ab", text_pair="cd")]


def test_saved_and_loaded(tokenizer: ExactTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    for text in TRICKY:
        assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.eos_token_id == 0
    assert len(loaded) == tokenizer.vocab_size
    copied = pickle.loads(pickle.dumps(tokenizer))
    assert copied.encode("a copy") == tokenizer.encode("a copy")


def test_unknown_name() -> None:
    with pytest.raises(InputError, match="unknown tokenizer 'word'"):
        get_tokenizer("word")


def test_time_is_linear(tokenizer: ExactTokenizer) -> None:
    """A megabyte takes seconds at most; anything quadratic would take hours."""
    start = time.perf_counter()
    for text in ("the quick brown fox " * 50_000, "a" * 1_000_000, " " * 1_000_000):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    blob = b"\xff" + b"a" * 500_000
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(blob)) == blob
    assert time.perf_counter() - start < 30


# ------------------------------------------------- against the published vocabulary file


def published_vocabulary() -> dict[bytes, int]:
    folder = os.environ.get("RWKVX_DATA")
    path = Path(folder or "", "rwkv_vocab", "rwkv_vocab_v20230424.txt.gz")
    if not folder or not path.is_file():
        pytest.skip("needs rwkv_vocab/ in the data folder that RWKVX_DATA names")
    entries: dict[bytes, int] = {}
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            number, rest = line.rstrip("\n").split(" ", 1)
            literal = rest.rsplit(" ", 1)[0]
            value = eval(literal, {"__builtins__": {}})  # the file's own format: Python literals
            entries[value.encode() if isinstance(value, str) else value] = int(number)
    return entries


def longest_match(entries: dict[bytes, int], longest: int, data: bytes) -> list[int]:
    """The definition: at each place, the longest entry that fits. Slow and plain on purpose."""
    ids = []
    while data:
        size = next(n for n in range(min(longest, len(data)), 0, -1) if data[:n] in entries)
        ids.append(entries[data[:size]])
        data = data[size:]
    return ids


def test_world_agrees_with_the_published_vocabulary() -> None:
    entries = published_vocabulary()
    longest = max(map(len, entries))
    world = TOKENIZERS["world"]
    assert len(entries) == 65529
    assert all(world.token_bytes()[i] == entry for entry, i in entries.items())
    pieces = sorted(entries)

    # Arbitrary bytes rarely match long entries: also concatenate entries, cut anywhere.
    spelled = st.lists(st.sampled_from(pieces), max_size=30).map(b"".join)
    cut = st.tuples(spelled, st.integers(0, 5), st.integers(0, 5)).map(
        lambda t: t[0][t[1] : len(t[0]) - t[2]]
    )

    @settings(max_examples=300, deadline=None)
    @given(data=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode), cut))
    def agree(data: bytes) -> None:
        assert world.encode_bytes(data) == longest_match(entries, longest, data)

    agree()


@pytest.mark.parametrize("name", ["tinyshakespeare/input.txt", "wikitext2_raw_test/wiki.test.raw"])
def test_world_agrees_on_real_text(name: str) -> None:
    entries = published_vocabulary()
    data = Path(os.environ["RWKVX_DATA"], name).read_bytes()[:100_000]
    world = TOKENIZERS["world"]
    expected = longest_match(entries, max(map(len, entries)), data)
    assert world.encode_bytes(data) == expected
    # Appending a byte that is no UTF-8 sends the same text through the other path.
    assert world.encode_bytes(data + b"\xff")[: len(expected) - 1] == expected[:-1]
