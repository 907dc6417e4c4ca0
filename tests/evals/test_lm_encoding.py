"""Where a continuation starts: on every merging pair of a vocabulary sample, and in odd texts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import CountingModel, tiny_model

from rwkvx.errors import InputError
from rwkvx.tokenizers import WorldTokenizer

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from rwkvx_evals.lm.chat import Chat
from rwkvx_evals.lm.encoding import encode_pair, from_start
from rwkvx_evals.lm.model import RwkvxLM

WORLD = WorldTokenizer()


@pytest.fixture(scope="module")
def lm() -> RwkvxLM:
    return RwkvxLM(tiny_model("world", 65536), quiet=True)


def score(lm: RwkvxLM, *pairs: tuple[str, str]) -> list[tuple[float, bool]]:
    return lm.loglikelihood(
        [Instance("loglikelihood", {}, pair, n, ("task", n, 1)) for n, pair in enumerate(pairs)]
    )


@torch.no_grad()
def direct(model: CountingModel, ids: list[int], first: int) -> float:
    """Log-probability of `ids[first:]` after `ids[:first]`."""
    logits, _ = model(torch.tensor([ids]))
    logprobs = logits[0].float().log_softmax(-1)[first - 1 : -1]
    return logprobs.gather(1, torch.tensor(ids[first:])[:, None]).double().sum().item()


def encode(text: str) -> list[int]:
    return list(WORLD.encode(text, add_special_tokens=False))


def vocabulary_pairs(tokens: int) -> Iterator[tuple[str, str]]:
    """Every way to cut tokens of the vocabulary in two, after some text."""
    rng = random.Random(7)
    table = [t.decode() for t in WORLD.token_bytes() if is_text(t) and len(t.decode()) > 1]
    for token in rng.sample(table, tokens):
        before = rng.choice(["", "12+30=", "The ", "x", "\n\n", "é"])
        for cut in range(1, len(token)):
            yield before + token[:cut], token[cut:]


def is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_every_pair_of_a_vocabulary_sample_is_scored_whole() -> None:
    merging = 0
    for context, continuation in vocabulary_pairs(1500):
        pair = encode_pair(encode, 0, context, continuation)
        whole = encode(context + continuation)
        start = pair.context == (0,)
        assert [*(() if start else pair.context), *pair.continuation] == whole
        assert pair.continuation
        # No more is scored than must be: all that both encodings share stands before.
        alone = encode(context.rstrip()) if context.strip() else []
        split = len(whole) - len(pair.continuation)
        assert whole[:split] == alone[:split]
        assert split == len(alone) or whole[split] != alone[split]
        assert pair.merged == (split < len(alone))
        merging += pair.merged
    assert merging > 1000


def test_merging_continuations_are_not_certain(lm: RwkvxLM) -> None:
    """ "12+30=4" and "2" are one token "42": 0.0 and greedy before, whatever the continuation."""
    pairs = [("12+30=4", end) for end in ("2", "3", "7")]
    found = score(lm, *pairs)
    assert len({round(logprob, 6) for logprob, _ in found}) == 3
    for (context, end), (logprob, greedy) in zip(pairs, found, strict=True):
        ids = encode(context + end)
        assert len(ids) == len(encode(context))  # what lm-eval would leave is nothing
        assert logprob == pytest.approx(direct(lm.model, ids, len(ids) - 1), abs=2e-4)
        assert not greedy
    assert lm.counts["merged"] >= 3


def test_all_merging_pairs_of_a_sample_against_a_direct_computation(lm: RwkvxLM) -> None:
    pairs = list(vocabulary_pairs(25))
    for (context, end), (logprob, _) in zip(pairs, score(lm, *pairs), strict=True):
        pair = encode_pair(encode, 0, context, end)
        ids = [*pair.context, *pair.continuation]
        expected = direct(lm.model, ids, len(pair.context))
        assert logprob == pytest.approx(expected, abs=3e-4), (context, end)
        assert logprob < 0.0


def test_where_nothing_merges_the_split_is_lm_evals(lm: RwkvxLM) -> None:
    texts = [("The cat sat on the ", "mat."), ("1 + 1 =", " 2"), ("你好", "世界"), ("a\n\n", "b c")]
    for context, continuation in texts:
        theirs = super(RwkvxLM, lm)._encode_pair(context, continuation)
        pair = encode_pair(encode, 0, context, continuation)
        assert (list(pair.context), list(pair.continuation), pair.merged) == (*theirs, False)


def test_a_text_without_tokens_means_the_start_of_a_document(lm: RwkvxLM) -> None:
    (blank, empty, spaces) = score(lm, (" ", " a"), ("", "  a"), ("  \n", "a"))
    assert blank == empty
    assert blank[0] == pytest.approx(direct(lm.model, [0, *encode("  a")], 1), abs=2e-4)
    assert spaces[0] == pytest.approx(direct(lm.model, [0, *encode("  \na")], 1), abs=2e-4)
    before = lm.counts["empty"]
    assert score(lm, ("", ""), ("a", ""), (" ", "")) == [(0.0, True)] * 3
    assert lm.counts["empty"] - before == 3
    request = [Instance("generate_until", {}, ("", {"max_gen_toks": 2}), 0, ("task", 0, 1))]  # type: ignore[arg-type]
    with torch.no_grad():
        first = int(lm.model(torch.tensor([[0]]), logits="last")[0].argmax())
    (text,) = lm.generate_until(request)
    assert text.startswith(WORLD.decode([first])) or first == 0


def test_one_document_start_and_something_to_predict() -> None:
    assert from_start([65, 66], 0) == ((0,), (65, 66), False)
    assert from_start([0, 65, 66], 0) == ((0,), (65, 66), False)  # it brings its own
    assert from_start([0, 0, 65], 0) == ((0,), (0, 65), False)
    assert from_start([0], 0) == ((0,), (0,), False)  # only an end of document: not for free
    assert from_start([], 0) == ((0,), (), False)


def test_a_text_of_only_ends_is_predicted(lm: RwkvxLM) -> None:
    model = tiny_model()
    own = RwkvxLM(model, quiet=True)
    (only_end,) = score(own, ("", "\0"))
    assert only_end[0] == pytest.approx(direct(model, [0, 0], 1), abs=2e-4)
    rolling = [Instance("loglikelihood_rolling", {}, ("\0",), 0, ("task", 0, 1))]
    assert own.loglikelihood_rolling(rolling)[0] == pytest.approx(only_end[0])
    (after_end,) = score(own, ("\0", "a"))
    assert after_end[0] == pytest.approx(direct(model, [0, 97], 1), abs=2e-4)


def test_templates_name_special_tokens_and_texts_do_not(tmp_path: Path) -> None:
    """One document start, as a template writes it; the same words in a text stay words."""
    file = tmp_path / "own.jinja"
    file.write_text("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
    chat = Chat(WORLD, None, str(file))
    name = str(WORLD.bos_token)
    assert chat.encode(name) == encode(name)
    assert len(encode(name)) > 1
    prompt = chat.apply([{"role": "user", "content": "Hello"}], True)
    assert chat.encode(prompt) == [0, *encode("Hello"), 0]
    with pytest.raises(InputError, match="refuses a conversation"):
        chat.apply([], True)
    file.write_bytes(b"\xff")
    with pytest.raises(InputError, match="it is not UTF-8"):
        Chat(WORLD, None, str(file)).select(True)
    with pytest.raises(InputError, match="has no chat template"):
        Chat(WORLD, "passkey-tiny", None).select(True)
