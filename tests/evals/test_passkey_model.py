"""The passkey run on a real model: forks and batches give what plain reading gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import CountingModel, tiny_model

from rwkvx.data.passkey import PasskeyBuilder, standard_filler
from rwkvx_evals.passkey.evaluate import evaluate
from rwkvx_evals.passkey.plan import Settings, depth_values

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
    builder, filler = PasskeyBuilder(model.tokenizer), standard_filler(model.tokenizer)
    results = evaluate(model, "tiny", SETTINGS, tmp_path, batch=batch, quiet=True)
    fed = model.tokens_fed
    assert fed <= results["prompt_tokens"]["read"] + 18 * 3
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 18
    for row in rows:
        prompt = builder.build(filler, row["length"], row["depth"], row["passkey"])
        expected = read_plainly(model, prompt.ids.tolist(), 4)
        assert row["tokens"] == expected[: len(row["tokens"])]
