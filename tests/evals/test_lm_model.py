"""The lm-eval model class against direct computation."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny import CountingModel, tiny_model

from rwkvx.errors import InputError
from rwkvx_evals.journal import Journal

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from rwkvx_evals.lm.encoding import Pair
from rwkvx_evals.lm.model import RwkvxLM
from rwkvx_evals.lm.requests import Request, make_batches, make_units, truncate

PAIRS = [
    ("The cat sat on the", " mat"),
    ("The cat sat on the", " roof of the house"),
    ("", "hello"),
    ("a", "b"),
    ("x" * 130, " and the end"),
    ("y" * 130, " or not"),
    ("The cat sat on the", "!"),
    ("The dog ran to the", " door"),
    ("The dog ran to the", " gate of the town"),
    ("word " * 39 + "word", " tail"),
    ("a", "b"),
]


@pytest.fixture(scope="module")
def model() -> CountingModel:
    return tiny_model()


def instances(pairs: list[tuple[str, ...]], kind: str = "loglikelihood") -> list[Instance]:
    return [
        Instance(kind, {}, pair, index, (f"task{index % 2}", index, 1))
        for index, pair in enumerate(pairs)
    ]


def make(model: CountingModel, **more: object) -> RwkvxLM:
    return RwkvxLM(model, quiet=True, **more)  # type: ignore[arg-type]


@torch.no_grad()
def direct(model: CountingModel, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One request alone: the whole sequence in one call, every logit."""
    logits, _ = model(torch.tensor([context + continuation]))
    logprobs = logits[0].float().log_softmax(-1)[len(context) - 1 : -1]
    wanted = torch.tensor(continuation)
    total = logprobs.gather(1, wanted[:, None]).double().sum().item()
    return total, bool((logprobs.argmax(-1) == wanted).all())


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_loglikelihoods_equal_a_direct_computation(model: CountingModel, batch: int) -> None:
    lm = make(model, batch_size=batch)
    for (context, continuation), (logprob, greedy) in zip(
        PAIRS, lm.loglikelihood(instances(PAIRS)), strict=True
    ):
        expected, is_greedy = direct(
            model, list(context.encode()) or [0], list(continuation.encode())
        )
        assert logprob == pytest.approx(expected, abs=2e-4)
        assert greedy == is_greedy


def test_a_greedy_continuation_is_recognised(model: CountingModel) -> None:
    context = list(b"The cat")
    with torch.no_grad():
        token = int(model(torch.tensor([context]), logits="last")[0].argmax())
    lm = make(model)
    best, other = lm._score(
        [Pair(tuple(context), (token,)), Pair(tuple(context), ((token + 1) % 256,))], ("a", "b")
    )
    assert best.greedy
    assert not other.greedy


def test_a_shared_context_is_read_once(model: CountingModel) -> None:
    context = "A long question with four answers:"
    pairs = [(context, answer) for answer in (" one", " two", " three", " f")]
    before = model.tokens_fed
    make(model).loglikelihood(instances(pairs))
    padded = 4 * (len(" three") - 1)
    assert model.tokens_fed - before == len(context) + padded
    before = model.tokens_fed
    make(model).loglikelihood(instances([(context, a) for a in "abcd"]))
    assert model.tokens_fed - before == len(context)


def test_equal_requests_are_computed_once(model: CountingModel) -> None:
    before = model.tokens_fed
    make(model).loglikelihood(instances([("same", " thing")] * 5))
    assert model.tokens_fed - before == len("same thing") - 1


def test_every_request_is_in_one_batch() -> None:
    requests = [Request(tuple(c.encode()) or (0,), tuple(a.encode())) for c, a in PAIRS[:-1]]
    for rows in (1, 3, 64):
        batches = make_batches(make_units(requests), rows)
        found = sorted(b.index for batch in batches for unit in batch for b in unit.branches)
        assert found == list(range(len(requests)))
        assert all(len({len(unit.prefix) for unit in batch}) == 1 for batch in batches)


def test_rolling_scores_every_token_after_one_document_start(
    model: CountingModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "Once upon a time there was a model. " * 5
    expected, _ = direct(model, [0], list(text.encode()))
    texts = instances([(text,), ("",), ("z",)], "loglikelihood_rolling")
    whole = make(model).loglikelihood_rolling(texts)
    assert whole[0] == pytest.approx(expected, abs=1e-3)
    assert whole[1] == 0.0
    # The same in parts, as when the logits of a long text do not fit into memory.
    monkeypatch.setattr("rwkvx_evals.lm.scoring.LOGITS_BYTES", 4 * 256 * 7)
    assert make(model).loglikelihood_rolling(texts)[0] == pytest.approx(expected, abs=1e-3)
    monkeypatch.undo()
    for limit, start in ((50, []), (7, [0])):
        windows = make(model, max_length=limit)._windows(start + list(text.encode()))
        assert [t for pair in windows for t in pair.continuation] == list(text.encode())
        assert max(len(pair.context) + len(pair.continuation) - 1 for pair in windows) <= limit


def test_long_requests_are_refused_or_cut_and_counted(model: CountingModel) -> None:
    with pytest.raises(InputError, match="3 of 11 requests are longer than 60 tokens"):
        make(model, max_length=60).loglikelihood(instances(PAIRS))
    lm = make(model, max_length=60, truncate="left")
    found = lm.loglikelihood(instances(PAIRS))
    assert lm.counts["truncated"] == 3
    context = list(PAIRS[9][0].encode())
    continuation = list(b" tail")
    expected, _ = direct(model, context[len(context) + len(continuation) - 1 - 60 :], continuation)
    assert found[9][0] == pytest.approx(expected, abs=2e-4)
    with pytest.raises(InputError, match="does not fit"):
        make(model, max_length=2, truncate="middle").loglikelihood(instances(PAIRS))
    assert make(model).max_length is None


def test_truncation_keeps_the_right_part() -> None:
    ids = tuple(range(10))
    assert truncate(ids, 4, "left") == (6, 7, 8, 9)
    assert truncate(ids, 5, "middle") == (0, 1, 7, 8, 9)
    assert truncate(ids, 12, "left") == ids


def test_not_a_number_is_invalid_for_its_request_alone() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.emb.weight[ord("Z")] = float("nan")
    lm = make(model, strict=False)
    good, bad = lm.loglikelihood(instances([("abc", " def"), ("aZc", " def")]))
    assert good[0] == pytest.approx(direct(model, list(b"abc"), list(b" def"))[0], abs=2e-4)
    assert math.isnan(bad[0])
    assert lm.failures == {"task1": {"oom": 0, "invalid": 1}}
    assert lm.asked == {"task0": 1, "task1": 1}
    with pytest.raises(InputError, match=r"1 of 2 requests have no answer \(1 with not-a-number"):
        make(model).loglikelihood(instances([("abc", " def"), ("aZc", " def")]))
    assert make(model, strict=False).generate_until(
        instances([("aZ", {"max_gen_toks": 2})], "generate_until")  # type: ignore[list-item]
    ) == [""]
    with pytest.raises(InputError, match="no score would be right"):
        make(model).generate_until(instances([("aZ", {})], "generate_until"))  # type: ignore[list-item]


def test_memory_that_runs_out_halves_the_batch(
    model: CountingModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = make(model).loglikelihood(instances(PAIRS))
    original = CountingModel.forward

    def limited(self: CountingModel, ids: torch.Tensor, *args: object, **kwargs: object) -> object:
        if ids.shape[0] > 1 and ids.shape[1] != 3:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")
        if 120 in ids.tolist()[0]:
            raise MemoryError
        return original(self, ids, *args, **kwargs)

    monkeypatch.setattr(CountingModel, "forward", limited)
    lm = make(model, batch_size=8, strict=False)
    found = lm.loglikelihood(instances([PAIRS[5], PAIRS[4], PAIRS[9]]))
    assert found[0][0] == pytest.approx(expected[5][0], abs=2e-4)
    assert found[2][0] == pytest.approx(expected[9][0], abs=2e-4)
    assert math.isnan(found[1][0])
    assert lm.failures == {"task1": {"oom": 1, "invalid": 0}}


def test_a_journal_answers_again_without_reading(model: CountingModel, tmp_path: Path) -> None:
    with Journal(tmp_path / "a.jsonl") as journal:
        first = make(model, journal=journal).loglikelihood(instances(PAIRS))
    lines = (tmp_path / "a.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == len(set(PAIRS))
    before = model.tokens_fed
    with Journal(tmp_path / "a.jsonl") as journal:
        assert make(model, journal=journal).loglikelihood(instances(PAIRS)) == first
    assert model.tokens_fed == before
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:9])
    with Journal(tmp_path / "a.jsonl") as journal:
        assert make(model, journal=journal).loglikelihood(instances(PAIRS)) == first
    assert sorted((tmp_path / "a.jsonl").read_bytes().splitlines(keepends=True)) == sorted(lines)


def test_the_name_is_registered(model: CountingModel) -> None:
    assert get_model("rwkvx") is RwkvxLM
    with pytest.raises(InputError, match="pretrained"):
        RwkvxLM()
    with pytest.raises(InputError, match="left, middle"):
        make(model, truncate="right")
    for size in (0, "many", "-1"):
        with pytest.raises(InputError, match="from 1 on nor auto"):
            make(model, batch_size=size)
    assert make(model, batch_size="auto:4", max_batch_size=3)._scorer.batch == 3
