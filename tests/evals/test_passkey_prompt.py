"""Prompts have exactly the tokens asked for, and share what they say they share."""

from __future__ import annotations

import numpy as np
import pytest
from oracle import ByteTokenizer

from rwkvx.data.passkey import (
    MAX_KEY,
    MIN_KEY,
    QUESTION,
    STANDARD_FILLER,
    TASK,
    Encoder,
    PasskeyBuilder,
    draw_key,
    needle_text,
    prose_filler,
    standard_filler,
)
from rwkvx.errors import InputError


class WorldTokenizer(ByteTokenizer):
    """The RWKV World vocabulary, as greedy longest match over the kept PyPI package."""

    def __init__(self) -> None:
        package = pytest.importorskip("pyrwkv_tokenizer")
        self._inner = package.RWKVTokenizer()

    def encode(self, text: str, /, *, add_special_tokens: bool = False) -> list[int]:
        return list(self._inner.encode(text))

    def decode(self, ids: list[int], /) -> str:
        return str(self._inner.decode(ids))


@pytest.fixture(scope="module", params=[ByteTokenizer, WorldTokenizer])
def tokenizer(request: pytest.FixtureRequest) -> Encoder:
    made: Encoder = request.param()
    return made


@pytest.mark.parametrize("prose", [False, True])
def test_lengths_are_exact(tokenizer: Encoder, prose: bool) -> None:
    rng = np.random.default_rng(0)
    builder = PasskeyBuilder(tokenizer)
    text = "Call me Ishmael. Some years ago, never mind how long precisely. " * 9
    filler = prose_filler(tokenizer, text, "prose") if prose else standard_filler(tokenizer)
    for _ in range(300):
        length = int(rng.integers(builder.minimum, 5000))
        depth, key = float(rng.random()), int(rng.integers(MIN_KEY, MAX_KEY + 1))
        prompt = builder.build(filler, length, depth, key, offset=int(rng.integers(2000)))
        assert prompt.ids.shape == (length,)
        assert prompt.ids.dtype == np.int64
        assert prompt.needle_start == builder.prefix_length(length, depth)


def test_no_key_has_a_longer_needle(tokenizer: Encoder) -> None:
    builder = PasskeyBuilder(tokenizer)
    filler = standard_filler(tokenizer)
    for key in range(MIN_KEY, MAX_KEY + 1, 7):
        ids = builder.build(filler, builder.minimum, 1.0, key).ids
        assert len(ids) == builder.minimum


def test_the_text_is_the_published_one() -> None:
    tokenizer = ByteTokenizer()
    prompt = PasskeyBuilder(tokenizer).build(standard_filler(tokenizer), 700, 0.5, 4321)
    text = tokenizer.decode(prompt.ids.tolist())
    start = f"{TASK}\n{STANDARD_FILLER} {STANDARD_FILLER} "
    assert text.startswith(start)
    assert text.endswith(f"\n{QUESTION}")
    before, after = text.split(f"\n{needle_text(4321)}\n")
    filler = before[len(TASK) + 1 :] + after[: -len(QUESTION) - 1]
    assert filler == " ".join([STANDARD_FILLER] * 20)[: len(filler)]


def test_the_prefix_does_not_depend_on_the_key(tokenizer: Encoder) -> None:
    builder, filler = PasskeyBuilder(tokenizer), standard_filler(tokenizer)
    prompts = [builder.build(filler, 900, 0.7, key) for key in (7, 123, 50_000)]
    deeper = builder.prefix(filler, 900, 0.9)
    for prompt in prompts:
        assert np.array_equal(prompt.prefix, prompts[0].prefix)
        assert np.array_equal(deeper[: len(prompt.prefix)], prompt.prefix)


def test_long_filler_starts_again() -> None:
    filler = prose_filler(ByteTokenizer(), "abcde", "five")
    assert bytes(filler.take(3, 12).tolist()) == b"de\n\nabcde\n\nab"[:12]


def test_answer_ends_the_document(tokenizer: Encoder) -> None:
    assert PasskeyBuilder(tokenizer).answer(42)[-1] == 0


def test_too_short_and_wrong_depth(tokenizer: Encoder) -> None:
    builder = PasskeyBuilder(tokenizer)
    filler = standard_filler(tokenizer)
    with pytest.raises(InputError, match=f"at least {builder.minimum} tokens"):
        builder.build(filler, builder.minimum - 1, 0.5, 1)
    with pytest.raises(InputError, match="not between 0 and 1"):
        builder.build(filler, 2000, 1.5, 1)


def test_keys_are_drawn_from_seed_length_and_depth() -> None:
    keys = [draw_key(seed, 1024, depth) for seed in range(200) for depth in (0.0, 1 / 9, 1.0)]
    assert keys == [draw_key(s, 1024, d) for s in range(200) for d in (0.0, 1 / 9, 1.0)]
    assert len(set(keys)) > 590
    assert min(keys) >= MIN_KEY
    assert max(keys) <= MAX_KEY
