"""The passkey run on a real model: forks and batches give what plain reading gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import CountingModel, tiny_model

from rwkvx.data.passkey import PasskeyBuilder, standard_filler
from rwkvx_evals.journal import Journal
from rwkvx_evals.passkey.plan import Plan, Settings, depth_values
from rwkvx_evals.passkey.run import PROBE_TOKENS, PasskeyRun

SETTINGS = Settings((300, 700), depth_values(3), 3, 4, "float32")


@torch.no_grad()
def read_plainly(model: CountingModel, ids: list[int], steps: int) -> list[int]:
    """Greedy continuation with the whole sequence read again for every token."""
    for _ in range(steps):
        logits, _ = model(torch.tensor([ids]), logits="last")
        ids = [*ids, int(logits[0, 0].argmax())]
    return ids[-steps:]


@pytest.mark.parametrize("batch", [None, 1])
def test_forks_answer_as_whole_prompts_do(tmp_path: Path, batch: int | None) -> None:
    model = tiny_model()
    builder = PasskeyBuilder(model.tokenizer)
    filler = standard_filler(model.tokenizer)
    plan = Plan(SETTINGS, builder, filler, model.fingerprint())
    with Journal(tmp_path / "samples.jsonl") as journal:
        run = PasskeyRun(model, plan, journal, batch=batch, quiet=True)
        run.run()
        fed = model.tokens_fed
        steps = 18 if batch is None else 18 * 3
        assert plan.shared_tokens() == run.tokens_read
        assert fed <= plan.shared_tokens() + PROBE_TOKENS[1] + steps * 3
        for sample in plan.samples:
            prompt = builder.build(filler, sample.length, sample.depth, sample.passkey)
            expected = read_plainly(model, prompt.ids.tolist(), 4)
            found = journal.rows[sample.key]["tokens"]
            assert found == expected[: len(found)]


def test_a_large_cache_makes_batches_smaller() -> None:
    model = tiny_model()
    builder, filler = PasskeyBuilder(model.tokenizer), standard_filler(model.tokenizer)
    plan = Plan(SETTINGS, builder, filler, "")
    run = PasskeyRun(model, plan, None, quiet=True)  # type: ignore[arg-type]
    probe = run.probe()
    # One sparse block: keys and values of one head of 64 numbers in float32.
    assert 512 <= probe.bytes_per_token <= 2 * 512
    assert probe.rows_within(1000, 10 * int(probe.bytes_per_token) * 1000) >= 5
    assert probe.rows_within(10**6, 1) == 1
