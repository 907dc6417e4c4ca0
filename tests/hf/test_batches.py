"""Padding, packing and caches: a row of any batch gives what it gives alone.

Axes: B batch, T time, V vocabulary.
"""

import copy

import pytest
import torch
from adapters import LENGTHS, adapter, core, padded, prompts
from small import error
from torch import Tensor
from transformers import Cache, DataCollatorWithFlattening, DynamicCache

from rwkvx import InputError
from rwkvx.hf import RwkvxForCausalLM, StateCache


@pytest.fixture(scope="module")
def hf() -> RwkvxForCausalLM:
    return adapter()


def alone(hf: RwkvxForCausalLM, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return core(hf)(ids)[0]


def real(x: Tensor, mask: Tensor, row: int) -> Tensor:
    return x[row : row + 1, mask[row].bool()]


@pytest.mark.parametrize("side", ["left", "right", "holes"])
@pytest.mark.parametrize("use_cache", [False, True])
@torch.no_grad()
def test_padding_changes_nothing(hf: RwkvxForCausalLM, side: str, use_cache: bool) -> None:
    rows = prompts()
    batch = padded(rows, side)
    out = hf(**batch, use_cache=use_cache)
    assert out.logits.shape == (len(rows), max(LENGTHS), 256)
    for i, row in enumerate(rows):
        assert error(real(out.logits, batch["attention_mask"], i), alone(hf, row)) < 1e-11
    assert not out.logits[batch["attention_mask"] == 0].any()
    assert (out.past_key_values is not None) == use_cache


@pytest.mark.parametrize("side", ["left", "right", "holes"])
@torch.no_grad()
def test_long_padded_batches_are_read_in_segments(
    hf: RwkvxForCausalLM, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of at most so many tokens, with the logits, hidden states and cache of one reading."""
    monkeypatch.setattr("rwkvx.model.SEGMENT_TOKENS", {"cpu": 4 * 64})
    rows = prompts(lengths=[190, 3, 70, 100])
    batch, seen = padded(rows, side), []
    handle = core(hf).blocks[0].register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[:2]))
    out = hf(**batch, output_hidden_states=True)
    handle.remove()
    assert len(seen) == 3
    assert max(b * t for b, t in seen) <= 4 * 64
    assert {x.shape for x in out.hidden_states} == {(4, 190, 32)}
    token = torch.tensor([[5]])
    mask = torch.cat([batch["attention_mask"], torch.ones(4, 1, dtype=torch.int64)], dim=1)
    after = hf(token.expand(4, 1), attention_mask=mask, past_key_values=out.past_key_values).logits
    for i, row in enumerate(rows):
        expected = alone(hf, torch.cat([row, token], dim=1))
        assert error(real(out.logits, batch["attention_mask"], i), expected[:, :-1]) < 1e-11
        assert error(after[i : i + 1], expected[:, -1:]) < 1e-11
    assert not out.logits[batch["attention_mask"] == 0].any()


@pytest.mark.parametrize("side", ["left", "right", "holes"])
@torch.no_grad()
def test_a_cache_of_unequal_rows_goes_on(hf: RwkvxForCausalLM, side: str) -> None:
    """Token by token, then another padded part, then a fork and a choice of rows."""
    rows, more, last = prompts(), prompts(1, [20] * 5), prompts(2, [3, 40, 1, 7, 33])
    batch = padded(rows, side)
    cache = hf(**batch, use_cache=True).past_key_values
    mask = batch["attention_mask"]
    for step in range(20):
        token = torch.cat([x[:, step : step + 1] for x in more])
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        out = hf(token, attention_mask=mask, past_key_values=cache)
        assert out.past_key_values is cache
        for i in range(len(rows)):
            text = torch.cat([rows[i], more[i][:, : step + 1]], dim=1)
            assert error(out.logits[i : i + 1], alone(hf, text)[:, -1:]) < 1e-11
    batch = padded(last, side)
    for _ in range(2):  # the second time after the fork has written
        fork = copy.copy(cache)
        fork.reorder_cache(torch.tensor([4, 1, 1, 0, 2]))
        picked = [4, 1, 1, 0, 2]
        mask = torch.cat([mask[:, :120], batch["attention_mask"]], dim=1)
        out = hf(batch["input_ids"], attention_mask=mask, past_key_values=fork)
        for i, row in enumerate(picked):
            text = torch.cat([rows[row], more[row], last[i]], dim=1)
            expected = alone(hf, text)[:, -last[i].shape[1] :]
            assert error(real(out.logits, batch["attention_mask"], i), expected) < 1e-11
    assert cache.get_seq_length() == max(LENGTHS) + 20


@torch.no_grad()
def test_batch_neighbours_do_not_matter(hf: RwkvxForCausalLM) -> None:
    ids = torch.cat(prompts(lengths=[90] * 3))
    together = hf(ids).logits
    for i in range(3):
        assert error(together[i : i + 1], hf(ids[i : i + 1]).logits) < 1e-11


@pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens_q"])
def test_padding_free_batches(hf: RwkvxForCausalLM, how: str) -> None:
    """What transformers' collator makes of examples, loss and gradients included."""
    rows = [row[0].tolist() for row in prompts()]
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=how != "position_ids")
    batch = collator([{"input_ids": row, "labels": row} for row in rows])
    if how == "cu_seq_lens_q":
        batch.pop("position_ids")
    flat = hf(**batch, use_cache=False)
    flat.loss.backward()
    gradients = [p.grad.clone() for p in hf.parameters()]
    hf.zero_grad()
    total, start = 0, 0
    for row in prompts():
        out = hf(row, labels=row)
        n = row.shape[1]
        assert error(flat.logits[:, start : start + n], out.logits) < 1e-11
        start += n
        total = total + (out.loss * (n - 1) if n > 1 else 0)
    loss = total / (sum(LENGTHS) - len(LENGTHS))
    assert float(flat.loss.detach() - loss.detach()) == pytest.approx(0, abs=1e-5)  # float32 losses
    loss.backward()
    for p, expected in zip(hf.parameters(), gradients, strict=True):
        assert error(p.grad, expected) < 1e-5
    hf.zero_grad()


def test_padding_leaves_loss_and_gradients(hf: RwkvxForCausalLM) -> None:
    rows = prompts()
    gradients = []
    for side in ("left", "right"):
        batch = padded(rows, side)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        # A row's first token is scored after padding on the left, where no logits are: leave it.
        first = batch["attention_mask"].argmax(dim=1)
        labels[torch.arange(len(rows)), first] = -100
        out = hf(**batch, labels=labels, use_cache=False)
        out.loss.backward()
        gradients.append([p.grad.clone() for p in hf.parameters()])
        hf.zero_grad()
    for a, b in zip(*gradients, strict=True):
        assert error(a, b) < 1e-11


@torch.no_grad()
def test_the_cache_interface(hf: RwkvxForCausalLM) -> None:
    rows = torch.cat(prompts(lengths=[40] * 3))
    cache = hf(rows).past_key_values
    assert isinstance(cache, Cache)
    assert (len(cache), cache.get_seq_length(), cache.batch_size) == (4, 40, 3)
    assert cache.get_max_length() == -1
    assert not cache.is_compileable
    assert not cache.is_croppable
    token = torch.tensor([[5]])
    deep = copy.deepcopy(cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    out = hf(token.expand(2, 1), past_key_values=cache)
    expected = [alone(hf, torch.cat([rows[i : i + 1], token], 1))[:, -1:] for i in (1, 0)]
    assert error(out.logits, torch.cat(expected)) < 1e-11
    out = hf(token.expand(3, 1), past_key_values=deep)
    assert error(out.logits[1:2], expected[0]) < 1e-11
    cache.crop(0)
    with pytest.raises(InputError, match="cannot be cropped"):
        cache.crop(-1)
    cache.reset()
    assert (len(cache), cache.get_seq_length(), cache.batch_size) == (0, 0, -1)
    for name in ("past_key_values", "cache"):  # the second name: transformers 5.24 and later
        given = StateCache()
        assert hf(rows, **{name: given}).past_key_values is given
    assert error(hf(rows, past_key_values=cache).logits, hf(rows).logits) < 1e-12


def test_bad_arguments(hf: RwkvxForCausalLM) -> None:
    ids = prompts()[0]
    for arguments, message in (
        ({}, "either input_ids or inputs_embeds"),
        ({"input_ids": ids, "inputs_embeds": torch.zeros(1, 70, 32)}, "either input_ids"),
        ({"input_ids": ids, "attention_mask": torch.ones(1, 1, 70, 70)}, r"must be \[B, past \+ T"),
        ({"input_ids": ids, "attention_mask": torch.ones(1, 60)}, r"beside 70 tokens, got \[1, 60"),
        ({"input_ids": ids, "attention_mask": torch.zeros(1, 70)}, "no token at all"),
        ({"input_ids": ids, "past_key_values": DynamicCache()}, "must be a StateCache"),
        ({"input_ids": ids, "cache": DynamicCache()}, "must be a StateCache"),
        (
            {"input_ids": ids, "cache": StateCache(), "past_key_values": StateCache()},
            "two names of one thing",
        ),
        ({"input_ids": ids, "output_attentions": True}, "attention matrices are never formed"),
        ({"input_ids": ids, "cu_seq_lens_q": torch.tensor([0, 3])}, "must rise from 0 to T = 70"),
        ({"inputs_embeds": torch.zeros(1, 70, 31)}, "ids must be int64"),
    ):
        with pytest.raises(InputError, match=message):
            hf(**arguments)
