"""Coarse-to-fine selection in whole models: from the config to the attention, however they read."""

from dataclasses import replace

import pytest
import torch
from small import HYBRID, error, random_ids, random_model

from rwkvx.model import Model
from rwkvx_kernels.chunk_select import common

TOKENS = 700  # chunks of one token; up to 256 are always scored


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    """Few nodes are kept, so that the choice differs from the flat one in a short text."""
    monkeypatch.setattr(common, "beam_widths", lambda topk: (4, 2))
    return random_model(replace(HYBRID, chunk_size=1, selection="coarse_to_fine"))


def test_another_choice_than_flat(model: Model) -> None:
    flat = random_model(replace(HYBRID, chunk_size=1))
    ids = random_ids(TOKENS, batch=1)
    with torch.no_grad():
        logits, expected = model(ids)[0], flat(ids)[0]
    assert error(logits[:, :256], expected[:, :256]) < 1e-12
    assert error(logits[:, 256:], expected[:, 256:]) > 1e-6


def test_pieces_and_single_tokens_equal_the_whole(model: Model) -> None:
    ids = random_ids(TOKENS, batch=2)
    with torch.no_grad():
        whole, _ = model(ids)
        parts, state = [], None
        for part in ids.split([300, 200, 170, *[1] * 30], dim=1):
            logits, state = model(part, state)
            parts.append(logits)
    assert error(torch.cat(parts, dim=1), whole) < 1e-11


def test_training_and_packed_sequences_select_the_same_way(model: Model) -> None:
    ids = random_ids(TOKENS, batch=1)
    whole = model(ids)[0]
    assert whole.requires_grad
    with torch.no_grad():
        assert error(model(ids)[0], whole) < 1e-11
        packed = torch.cat([ids, ids[:, :50]], dim=1)
        logits = model(packed, cu_seqlens=torch.tensor([0, TOKENS, TOKENS + 50]))[0]
    assert error(logits[:, :TOKENS], whole) < 1e-11
