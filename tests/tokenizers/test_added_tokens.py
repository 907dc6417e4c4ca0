"""Tokens added to a vocabulary: new ids at its end, texts cut at them, all of it exact."""

import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AddedToken

from rwkvx.errors import InputError
from rwkvx.tokenizers import ExactTokenizer, WorldTokenizer, get_tokenizer

NEW = ["<|user|>", "<|user|>s", "今天是", "é", "brand new token"]


@pytest.fixture(params=["world", "bytes"])
def tokenizer(request: pytest.FixtureRequest) -> ExactTokenizer:
    return get_tokenizer(request.param)


def test_new_tokens_get_the_next_ids(tokenizer: ExactTokenizer) -> None:
    size = tokenizer.vocab_size
    assert tokenizer.add_tokens(["<|user|>", "<|bot|>"]) == 2
    assert tokenizer.add_tokens(["<|bot|>", "<|end|>"]) == 1
    assert tokenizer.convert_tokens_to_ids(["<|user|>", "<|bot|>", "<|end|>"]) == [
        size, size + 1, size + 2
    ]  # fmt: skip
    assert (len(tokenizer), tokenizer.vocab_size) == (size + 3, size)
    assert len(tokenizer.get_vocab()) == size + 3
    text = "<|user|>hi<|bot|>ho <|end|>"
    ids = tokenizer.encode(text)
    assert [i for i in ids if i >= size] == [size, size + 1, size + 2]
    assert tokenizer(text)["input_ids"] == tokenizer.encode_bytes(text.encode()) == ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.convert_tokens_to_string(tokenizer.tokenize(text)) == text
    assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) == ids
    with pytest.raises(InputError, match=f"token id {size + 3} is outside the vocabulary"):
        tokenizer.decode([size + 3])


def test_what_has_an_id_keeps_it() -> None:
    world = get_tokenizer("world")
    (hello,) = world.encode("hello")
    (accent,) = world.encode("é")
    assert world.add_tokens(["hello", "é", "<|unused_65530|>"]) == 0
    assert world.convert_tokens_to_ids(["hello", "é", "<|unused_65530|>"]) == [hello, accent, 65530]
    assert len(world) == 65536
    plain = get_tokenizer("bytes")
    assert plain.add_tokens(["a", "é"]) == 1
    assert plain.encode("aéa") == [97, 256, 97]
    assert plain.encode_bytes(b"\xe9\xc3\xa9") == [0xE9, 256]
    assert plain.decode([97, 256, 97]) == "aéa"
    assert len(plain) == 257


@settings(max_examples=200, deadline=None)
@given(
    text=st.lists(st.one_of(st.sampled_from(NEW), st.text(max_size=10))).map("".join),
    junk=st.binary(max_size=10),
)
def test_every_text_comes_back(text: str, junk: bytes) -> None:
    for grown in GROWN:
        ids = grown.encode(text)
        assert grown.decode(ids) == text
        assert grown.decode_bytes(ids) == text.encode()
        data = text.encode() + junk
        assert grown.decode_bytes(grown.encode_bytes(data)) == data


def grown(name: str) -> ExactTokenizer:
    tokenizer = get_tokenizer(name)
    tokenizer.add_tokens(NEW)
    return tokenizer


GROWN = [grown("world"), grown("bytes")]


def test_the_longest_token_wins() -> None:
    ids = GROWN[1].encode("<|user|>s<|user|>")
    assert ids == GROWN[1].convert_tokens_to_ids(["<|user|>s", "<|user|>"])


def test_special_tokens(tokenizer: ExactTokenizer) -> None:
    """Text that spells their names stays text; padding uses them; they stand for no bytes."""
    size = tokenizer.vocab_size
    added = {"pad_token": "<pad>", "extra_special_tokens": ["<user>", "<bot>"]}
    assert tokenizer.add_special_tokens(added) == 3
    assert {tokenizer.pad_token_id, *tokenizer.convert_tokens_to_ids(["<user>", "<bot>"])} == {
        size, size + 1, size + 2
    }  # fmt: skip
    batch = tokenizer(["a", "abc"], padding=True)
    width = len(batch["input_ids"][1])
    assert batch["input_ids"][0] == tokenizer.encode("a") + [tokenizer.pad_token_id] * (width - 1)
    assert size not in tokenizer.encode("<user><bot><pad>")
    user = tokenizer.convert_tokens_to_ids("<user>")
    ids = tokenizer.encode("<user>hi", split_special_tokens=False)
    assert ids == [user, *tokenizer.encode("hi")]
    assert tokenizer.decode(ids) == "<user>hi"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hi"
    assert tokenizer.decode_bytes(ids) == b"hi"


@pytest.mark.parametrize("bad", ["a\ud800", 3, None, b"x"])
def test_what_is_refused_changes_nothing(tokenizer: ExactTokenizer, bad: object) -> None:
    before = (len(tokenizer), tokenizer.special_tokens_map, tokenizer.added_tokens_encoder)
    for add in (
        lambda: tokenizer.add_special_tokens({"pad_token": bad}),
        lambda: tokenizer.add_special_tokens({"pad_token": "<new>", "cls_token": bad}),
        lambda: tokenizer.add_special_tokens({"extra_special_tokens": ["<new>", bad]}),
        lambda: tokenizer.add_tokens(["<new>", bad]),
        lambda: tokenizer.add_special_tokens({"pad_token": "<new>", "odd_token": "<odd>"}),
    ):
        with pytest.raises(InputError):
            add()
        now = (len(tokenizer), tokenizer.special_tokens_map, tokenizer.added_tokens_encoder)
        assert now == before
    assert tokenizer(["a", "b c d"], padding=True)["attention_mask"][0][-1] == 0


def test_saved_and_loaded(tokenizer: ExactTokenizer, tmp_path: Path) -> None:
    tokenizer.add_tokens(NEW)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(tmp_path)
    text = "hi <|user|>s 今天是é brand new token"
    copies = (type(tokenizer).from_pretrained(tmp_path), pickle.loads(pickle.dumps(tokenizer)))
    for copy in copies:
        assert len(copy) == len(tokenizer)
        assert copy.encode(text) == tokenizer.encode(text)
        assert copy.pad_token_id == tokenizer.pad_token_id
        assert copy.decode(copy.encode(text)) == text


def test_how_a_token_takes_spaces_and_words(tokenizer: ExactTokenizer) -> None:
    tokenizer.add_tokens(
        [AddedToken("<s>", lstrip=True, rstrip=True), AddedToken("cat", single_word=True)]
    )
    assert tokenizer.decode(tokenizer.encode("a  <s>  b")) == "a<s>b"
    cat = tokenizer.convert_tokens_to_ids("cat")
    cats = [tokenizer.encode(text).count(cat) for text in ("a cat", "cats", "cat,cat", "concat")]
    expected = [1, 0, 2, 0] if not isinstance(tokenizer, WorldTokenizer) else cats
    assert cats == expected


def test_growing_costs_no_speed(tokenizer: ExactTokenizer) -> None:
    """A megabyte in one piece, and cut in a hundred thousand."""
    tokenizer.add_tokens(["<|x|>"])
    for text in ("the quick brown fox " * 50_000, "ab<|x|>" * 100_000):
        assert tokenizer.decode(tokenizer.encode(text)) == text
