"""Generation options are honoured or refused; drawn texts depend on the seed alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CountingModel, tiny_model

from rwkvx.errors import InputError
from rwkvx.sampling import pick_token

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from rwkvx_evals.lm.generation import drawing
from rwkvx_evals.lm.model import RwkvxLM
from rwkvx_evals.lm.options import Options, read_options


@pytest.fixture(scope="module")
def model() -> CountingModel:
    return tiny_model()


def generate(model: CountingModel, *asked: tuple[str, Any], **more: Any) -> list[str]:
    requests = [
        Instance("generate_until", {}, pair, n, ("task", n, 1)) for n, pair in enumerate(asked)
    ]
    return RwkvxLM(model, quiet=True, **more).generate_until(requests)


@torch.no_grad()
def greedy(model: CountingModel, context: str, tokens: int) -> str:
    """One token after the other, reading everything again."""
    ids = list(context.encode())
    for _ in range(tokens):
        ids.append(int(model(torch.tensor([ids]), logits="last")[0].argmax()))
    return bytes(ids[len(context.encode()) :]).decode(errors="replace")


def test_greedy_text_is_that_of_single_steps(model: CountingModel) -> None:
    prompts = ["abc", "xyz", "The cat sat", "abd"]
    found = generate(model, *((p, {"max_gen_toks": 9}) for p in prompts))
    expected = [greedy(model, p, 9) for p in prompts]
    assert "\0" not in "".join(expected)  # none ends early
    assert found == expected
    single = [generate(model, (p, {"max_gen_toks": 9}), batch_size=1)[0] for p in prompts]
    assert found == single


@pytest.mark.parametrize(
    "name", ["max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"]
)
def test_every_name_of_the_limit(model: CountingModel, name: str) -> None:
    assert generate(model, ("abc", {name: 3})) == [greedy(model, "abc", 3)]
    assert generate(model, ("abc", {name: "3"})) == [greedy(model, "abc", 3)]


def test_no_tokens_at_all(model: CountingModel) -> None:
    before = model.tokens_fed
    assert generate(model, ("abc", {"max_gen_toks": 0})) == [""]
    assert model.tokens_fed == before


def test_every_form_of_until(model: CountingModel) -> None:
    whole = greedy(model, "abc", 9)
    stop = whole[4]
    for until in (stop, [stop], (stop,), [stop, ""], ["none of it", stop]):
        assert generate(model, ("abc", {"until": until, "max_gen_toks": 9})) == [
            whole.split(stop)[0]
        ]
    assert generate(model, ("abc", {"stop": [stop], "max_gen_toks": 9})) == [whole.split(stop)[0]]
    for until in (None, [], "", [""]):
        assert generate(model, ("abc", {"until": until, "max_gen_toks": 9})) == [whole]


@pytest.mark.parametrize(
    ("given_options", "options"),
    [
        ({}, Options()),
        ({"do_sample": False, "temperature": 0.0}, Options()),
        ({"do_sample": False, "temperature": 1, "top_p": 0.5}, Options()),  # LongBench
        ({"temperature": 0.7}, Options(temperature=0.7)),
        ({"do_sample": True}, Options(temperature=1.0)),
        ({"do_sample": True, "temperature": 0.2, "top_p": 0.95, "top_k": 40},
         Options(temperature=0.2, top_p=0.95, top_k=40)),
        ({"num_beams": 1, "repetition_penalty": 1.0, "use_cache": True}, Options()),
        ({"max_gen_toks": 5, "max_tokens": 9}, Options(limit=5)),  # lm-eval's order
    ],
)  # fmt: skip
def test_options_by_lm_evals_rules(given_options: dict[str, Any], options: Options) -> None:
    assert read_options(given_options) == options


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 4}, {"num_return_sequences": 2}, {"repetition_penalty": 1.2}, {"foo": 1},
        {"max_length": 20}, {"min_p": 0.1}, {"do_sample": True, "temperature": 0},
        {"temperature": -1}, {"temperature": "hot"}, {"temperature": math.nan}, {"top_p": 0},
        {"top_p": 1.5}, {"top_k": -1}, {"top_k": 2.5}, {"max_gen_toks": -3}, {"max_tokens": "x"},
        {"max_gen_toks": 1.5}, {"max_gen_toks": True}, {"until": 3}, {"until": [1]},
        {"stop": {"a": 1}}, {"do_sample": "yes"}, {"temperature": 10**400},
        {"a\nb": "c\x1b[0m" * 400},
    ],
)  # fmt: skip
def test_what_is_not_honoured_is_refused(model: CountingModel, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="generation option") as caught:
        generate(model, ("abc", {"max_gen_toks": 2, **options}))
    message = str(caught.value)
    assert len(message) <= 300
    assert message.isprintable()


values = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text())
names = st.sampled_from(
    ["until", "stop", "do_sample", "temperature", "top_p", "top_k", "max_gen_toks", "num_beams",
     "max_tokens", "use_cache", "other"]
)  # fmt: skip


def refusal(options: dict[str, Any]) -> str | None:
    try:
        read_options(options)
    except InputError as error:
        return str(error)
    return None


@given(st.dictionaries(names, values))
@settings(max_examples=200, deadline=None)
def test_any_options_are_read_or_refused_in_one_line(options: dict[str, Any]) -> None:
    message = refusal(options)
    if message is not None:
        assert len(message) <= 300
        assert message.isprintable()
        return
    found = read_options(options)
    assert found.limit >= 0
    assert 0 < found.top_p <= 1
    if options.get("do_sample") is False:
        assert found.temperature == 0.0


DRAWN = {"do_sample": True, "temperature": 1.5, "max_gen_toks": 12}


def test_drawn_texts_depend_on_the_seed_alone(model: CountingModel) -> None:
    prompts = [(p, DRAWN) for p in ("abc", "xyz", "abd", "abc", "abc")]
    torch.manual_seed(3)
    found = generate(model, *prompts)
    # The same prompt three times, as lm-eval's `repeats` asks: three draws.
    assert len({found[0], found[3], found[4]}) == 3
    assert found[0] != greedy(model, "abc", 12)
    for batch in (1, 2):
        assert generate(model, *prompts, batch_size=batch) == found
    assert generate(model, prompts[1])[0] == found[1]
    torch.manual_seed(4)
    assert generate(model, *prompts) != found
    # lm-eval's own temperature of a task that samples nothing.
    assert generate(model, ("abc", {**DRAWN, "do_sample": False})) == [greedy(model, "abc", 12)]
    assert generate(model, ("abc", {**DRAWN, "top_k": 1})) == [greedy(model, "abc", 12)]
    assert generate(model, ("abc", {**DRAWN, "top_p": 1e-9})) == [greedy(model, "abc", 12)]


def test_draws_follow_the_distribution() -> None:
    """Frequencies of the first token against softmax, with top-k: chi-squared."""
    logits = torch.tensor([1.0, 2.0, 0.5, -1.0, 1.5])
    options = Options(temperature=0.8, top_k=3)
    kept = [0, 1, 4]
    counts = dict.fromkeys(range(5), 0)
    for seed in range(3000):
        draw = drawing(options, seed)
        assert draw is not None
        counts[draw(logits)] += 1
    assert counts[2] == counts[3] == 0
    expected = torch.softmax(logits[kept] / 0.8, dim=-1) * 3000
    distance = sum(
        (counts[i] - float(e)) ** 2 / float(e) for i, e in zip(kept, expected, strict=True)
    )
    assert distance < 13.8  # two degrees of freedom: 1 in 1,000
    assert pick_token(logits, 0.0, 1.0) == 1


def test_long_prompts_leave_room_for_the_answer(model: CountingModel) -> None:
    asked = [("a" * 30, {"max_gen_toks": 8}), ("b" * 10, {"max_gen_toks": 8}), ("c" * 25, {})]
    with pytest.raises(InputError, match="2 of 3 requests are longer than 36 tokens"):
        generate(model, *asked, max_length=36)
    with pytest.raises(InputError, match="does not fit into 36"):
        generate(model, *asked, max_length=36, truncate="left")
    (left,) = generate(model, asked[0], max_length=20, truncate="left")
    assert left == greedy(model, "a" * 12, 8)
