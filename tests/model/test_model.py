"""From tokens to logits: the equations, any split of a text, forks of the state, packing."""

import random
from itertools import pairwise

import pytest
import torch
from small import HYBRID, TOKENS, VARIANTS, error, random_ids, random_model, variant
from torch import Tensor

import rwkvx
from rwkvx import InputError, Model, ModelState, repeat_state, select_state
from rwkvx.equations import Equations
from rwkvx.state import state_bytes

# Chunks of a few hundred tokens against one token at a time: the sums are ordered differently.
FACTOR = 10.0
SPLITS = [[1] * TOKENS, [100, 1, 1, 137, 1], [47, 1, 48, 144]]


def read(model: Model, ids: Tensor, parts: list[int], state: ModelState | None = None) -> Tensor:
    """Logits of the whole, read in parts."""
    outputs = []
    with torch.no_grad():
        for part in ids.split(parts, dim=1):
            logits, state = model(part, state)
            outputs.append(logits)
    assert state is not None
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_follow_the_equations(name: str) -> None:
    model = random_model(variant(name))
    ids = random_ids(100)
    logits, _ = model(ids)
    parameters = {n: x.numpy() for n, x in model.state_dict().items()}
    for row in range(2):
        expected = Equations(model.config, parameters).logits(ids[row].tolist())
        assert error(logits[row].detach(), torch.from_numpy(expected)) < 1e-11


@pytest.mark.parametrize("parts", [*SPLITS, "random"], ids=lambda x: str(x)[:20])
@pytest.mark.parametrize("name", VARIANTS)
def test_any_split_equals_the_whole(name: str, parts: list[int] | str) -> None:
    if isinstance(parts, str):
        draw = random.Random(name)
        parts = [b - a for a, b in pairwise([0, *sorted(draw.sample(range(1, TOKENS), 8)), TOKENS])]
    model, ids = random_model(variant(name)), random_ids()
    whole, _ = model(ids)
    assert error(read(model, ids, parts), whole.detach()) < 1e-11


@pytest.mark.parametrize("name", ["plain", "conv_gqa"])
def test_float32_errs_alike_whole_and_in_parts(name: str) -> None:
    """A state that is lost or rounded on the way would add to the error of one whole call."""
    config, ids = variant(name), random_ids()
    narrow = random_model(config).float()
    wide = random_model(config)
    wide.load_state_dict(narrow.state_dict())
    exact = wide(ids)[0].detach()
    own = error(narrow(ids)[0].detach(), exact)
    for parts in SPLITS:
        assert error(read(narrow, ids, parts), exact) <= FACTOR * own


def test_segments_without_gradients_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = random_model(variant("key_conv")), random_ids(1500, batch=1)
    expected, _ = model(ids)  # with gradients: in one piece
    with torch.no_grad():
        got, state = model(ids)
        last, _ = model(ids, logits="last")
    assert error(got, expected.detach()) < 1e-11
    assert error(last, expected[:, -1:].detach()) < 1e-11
    assert state.length == 1500


@pytest.mark.parametrize("grad", [False, True])
def test_kinds_of_logits(grad: bool) -> None:
    model, ids = random_model(HYBRID), random_ids(50)
    with torch.set_grad_enabled(grad):
        every, state = model(ids)
        last, _ = model(ids, logits="last")
        none, after = model(ids, logits="none")
    assert every.shape == (2, 50, 40)
    assert last.shape == (2, 1, 40)
    assert none is None
    assert error(last, every[:, -1:]) < 1e-12
    assert after.length == state.length == 50
    assert model(ids.int())[0].equal(model(ids)[0])


@pytest.mark.parametrize("name", ["key_conv", "gqa"])
@torch.no_grad()
def test_a_state_may_be_continued_again_and_again(name: str) -> None:
    model = random_model(variant(name))
    start, left, right = (random_ids(n, seed=n) for n in (70, 90, 91))
    _, state = model(start, logits="none")
    expected = {id(x): model(torch.cat([start, x], dim=1))[0][:, 70:] for x in (left, right)}
    for x in (left, right, left):
        assert error(read(model, x, [1, 30, x.shape[1] - 31], state), expected[id(x)]) < 1e-11
    assert state.length == 70


@torch.no_grad()
def test_rows_of_a_state() -> None:
    model = random_model(variant("key_conv"))
    start, rest = random_ids(60, batch=3), random_ids(30, batch=6, seed=1)
    _, state = model(start, logits="none")
    for picked, rows in (
        (repeat_state(state, 2), [0, 0, 1, 1, 2, 2]),
        (select_state(state, torch.tensor([2, 0, 2, 1, 1, 0])), [2, 0, 2, 1, 1, 0]),
        (select_state(state, [1]), [1]),
    ):
        part = rest[: len(rows)]
        expected, _ = model(torch.cat([start[rows], part], dim=1))
        assert error(model(part, picked)[0], expected[:, 60:]) < 1e-11
        assert picked.length == 60


@torch.no_grad()
def test_batch_neighbours_do_not_matter() -> None:
    model, ids = random_model(HYBRID), random_ids(120, batch=3)
    together, _ = model(ids)
    for row in range(3):
        assert error(model(ids[row : row + 1])[0], together[row : row + 1]) < 1e-11


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_sequences_equal_separate_ones(name: str) -> None:
    model, ids = random_model(variant(name)), random_ids(150, batch=1)
    offsets = [0, 1, 60, 62, 150]
    logits, state = model(ids, cu_seqlens=torch.tensor(offsets, dtype=torch.int32))
    for row, (a, b) in enumerate(pairwise(offsets)):
        alone, end = model(ids[:, a:b])
        assert error(logits[:, a:b].detach(), alone.detach()) < 1e-11
        for packed, single in zip(state.blocks, end.blocks, strict=True):
            for field in ("shift", "wkv", "ffn_shift", "conv"):
                x, y = getattr(packed, field, None), getattr(single, field, None)
                if x is not None and y is not None:
                    torch.testing.assert_close(x[row : row + 1], y, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_packed_sequences_continue(name: str) -> None:
    """Rows of unequal lengths: packed after a batch, picked, as a batch, packed again."""
    model, ids = random_model(variant(name)), random_ids(200, batch=3)

    def logits_of(row: int, a: int, b: int) -> Tensor:
        return model(ids[row : row + 1, :b])[0][:, a:]

    def packed(a: list[int], b: list[int], rows: list[int]) -> tuple[Tensor, Tensor]:
        parts = [ids[row, i:j] for row, i, j in zip(rows, a, b, strict=True)]
        offsets = torch.tensor([0, *(len(x) for x in parts)]).cumsum(0)
        return torch.cat(parts)[None], offsets

    for start in (0, 30):
        state = model(ids[:, :start])[1] if start else None
        ends = [start] * 3
        for lengths in ([0, 63, 0], [2, 0, 20]):
            starts, ends = ends, [end + n for end, n in zip(ends, lengths, strict=True)]
            part, offsets = packed(starts, ends, [0, 1, 2])
            logits, state = model(part, state, cu_seqlens=offsets)
            expected = [logits_of(row, starts[row], ends[row]) for row in range(3) if lengths[row]]
            assert error(logits, torch.cat(expected, dim=1)) < 1e-11
        rows = [1, 2, 1, 0]
        forked = select_state(state, rows)
        for _ in range(2):  # the second time from states that are already continued by others
            after = forked
            for step in range(20):
                tokens = torch.stack([ids[row, ends[row] + step] for row in rows])[:, None]
                logits, after = model(tokens, after)
                expected = [logits_of(row, ends[row] + step, ends[row] + step + 1) for row in rows]
                assert error(logits, torch.cat(expected)) < 1e-11
        part, offsets = packed([ends[row] + 20 for row in rows], [120, 121, 122, 123], rows)
        logits, _ = model(part, after, cu_seqlens=offsets)
        expected = [logits_of(row, ends[row] + 20, 120 + i) for i, row in enumerate(rows)]
        assert error(logits, torch.cat(expected, dim=1)) < 1e-11


def test_packed_sequences_may_start_from_passed_states() -> None:
    model, ids = random_model(variant("key_conv")), random_ids(100, batch=1)
    before = random_ids(50, batch=2, seed=3)
    passed = model(before)[1].recurrent()
    logits, _ = model(ids, passed, cu_seqlens=torch.tensor([0, 40, 100]))
    for row, (a, b) in enumerate(((0, 40), (40, 100))):
        alone, _ = model(ids[:, a:b], select_state(passed, [row]))
        assert error(logits[:, a:b].detach(), alone.detach()) < 1e-11


def test_the_recurrent_state_forgets_the_attention_only() -> None:
    model, ids = random_model(variant("key_conv")), random_ids(50)
    _, state = model(ids)
    passed = state.recurrent()
    assert passed.length == 0
    assert state_bytes(passed) == state_bytes(model(ids[:, :1], keep_cache=False)[1])
    for old, new in zip(state.blocks, passed.blocks, strict=True):
        assert torch.equal(old.ffn_shift, new.ffn_shift)
        assert not new.ffn_shift.requires_grad
        assert not getattr(new, "cached", ())
    model(ids, passed)[0].sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_state_without_cache_starts_attention_anew() -> None:
    model, ids = random_model(HYBRID), random_ids(50)
    _, kept = model(ids)
    _, dropped = model(ids, keep_cache=False)
    assert error(model(ids, dropped)[0].detach(), model(ids, kept.recurrent())[0].detach()) < 1e-12


def test_reading_on_needs_no_switch() -> None:
    """Without `torch.no_grad()` too, a state may be continued, forked, and read on by tokens."""
    model, ids = random_model(variant("key_conv")), random_ids(60)
    with torch.no_grad():
        expected, _ = model(ids)
    first, state = model(ids[:, :40])
    parts, last = [first, model(ids[:, 40:50], state)[0]], model(ids[:, 40:50], state)[1]
    for t in range(50, 60):
        logits, last = model(ids[:, t : t + 1], last)
        parts.append(logits)
    assert error(torch.cat(parts, dim=1).detach(), expected) < 1e-11


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_narrow_weights(dtype: torch.dtype) -> None:
    """Runs, in parts and whole; the matrix state stays float32; logits are near the exact ones."""
    model, ids = random_model(variant("key_conv")).to(dtype), random_ids()
    exact = random_model(variant("key_conv"))
    exact.load_state_dict(model.state_dict())
    expected, _ = exact(ids[:, :40])
    logits, state = model(ids)
    parts = read(model, ids, [100, 1, 139])
    assert logits.dtype == parts.dtype == dtype
    assert logits.isfinite().all()
    assert state.blocks[0].wkv.dtype == torch.float32  # type: ignore[union-attr]
    # Before selection can differ (40 tokens < topk · chunk); a few dozen roundings of a unit value.
    allowed = 30 * torch.finfo(dtype).eps
    assert error(logits[:, :40], expected) < allowed
    assert error(parts[:, :40], expected) < allowed


@torch.no_grad()
def test_a_narrow_state_of_the_whole_text_is_the_state_of_its_parts() -> None:
    model, ids = random_model(HYBRID).bfloat16(), random_ids(64)
    whole, parts = model(ids)[1], None
    for part in ids.split(8, dim=1):
        _, parts = model(part, parts)
    for a, b in zip(whole.blocks, parts.blocks, strict=True):
        if hasattr(a, "wkv"):
            assert error(b.wkv, a.wkv) < 0.1


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(5, dtype=torch.int64), r"ids must be int64 \[B, T\].*got \[5\]"),
        (torch.zeros(1, 0, dtype=torch.int64), "T >= 1"),
        (torch.zeros(0, 3, dtype=torch.int64), "B, T >= 1"),
        (torch.zeros(1, 3), r"float32"),
        (torch.tensor([[1, -2, 3]]), r"token id -2 is outside the vocabulary 0\.\.39"),
        (torch.tensor([[1, 40, 3]]), r"token id 40 is outside the vocabulary 0\.\.39"),
    ],
)
def test_bad_ids(ids: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        random_model(HYBRID)(ids)


def test_bad_states_and_offsets() -> None:
    model, ids = random_model(HYBRID), random_ids(20)
    with torch.no_grad():
        _, state = model(ids)
    with pytest.raises(InputError, match=r"the state is of 2 sequences, .* reads 1"):
        model(ids[:1], state)
    other = random_model(variant("only_rwkv7"))
    with pytest.raises(InputError, match="the state is of 4 blocks, the model has 2"):
        other(ids, state)
    with pytest.raises(InputError, match="block 0 takes a SparseState, not a Rwkv7State"):
        random_model(variant("sparse_first"))(ids, state)
    wide = {**HYBRID.to_dict(), "width": 64}
    with pytest.raises(InputError, match=r"shift is \[2, 32\], expected \[2, 64\]"):
        random_model(rwkvx.ModelConfig.from_dict(wide))(ids, state)
    with pytest.raises(InputError, match="logits must be one of"):
        model(ids, logits="some")
    with pytest.raises(InputError, match="cu_seqlens must be a 1-D integer tensor"):
        model(ids[:1], cu_seqlens=torch.tensor([[0, 20]]))
    for offsets in ([0, 10], [1, 20], [0, 11, 10, 20], [0]):
        with pytest.raises(InputError, match="cu_seqlens must rise from 0 to T = 20"):
            model(ids[:1], cu_seqlens=torch.tensor(offsets))
    with pytest.raises(InputError, match="batch size 1"):
        model(ids, cu_seqlens=torch.tensor([0, 20]))
    with pytest.raises(InputError, match=r"recurrent\(\)"):
        model(ids, state)[0].sum().backward()


def test_state_bytes_counts_tokens_not_capacity() -> None:
    model = random_model(HYBRID).float()
    with torch.no_grad():
        first, second = (model(random_ids(n))[1] for n in (16, 48))
    per_token = 2 * (2 * 32 * 4 + 32 * 4 / 16)  # two sparse blocks: keys, values, means
    assert state_bytes(second) - state_bytes(first) == 2 * 32 * per_token


def test_fingerprints() -> None:
    model = random_model(HYBRID)
    same, other = random_model(HYBRID), random_model(HYBRID, seed=1)
    assert model.fingerprint() == same.fingerprint() != other.fingerprint()
    config = rwkvx.ModelConfig.from_dict({**HYBRID.to_dict(), "topk": 2})
    assert random_model(config).fingerprint() != model.fingerprint()
