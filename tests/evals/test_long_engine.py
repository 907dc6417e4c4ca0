"""The engine of long-context tasks: right answers, sharing, failures, resuming, one report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from needles import TASKS, Needle, Noise, SmallWriter, ask, oracle
from oracle import Oracle
from tiny import CountingModel, tiny_model

from rwkvx.errors import InputError
from rwkvx_evals.folder import MARK
from rwkvx_evals.long.plan import Plan, Settings, Target, cut
from rwkvx_evals.long.prefixes import QUANTUM, common, prefix_hashes, prefix_tree
from rwkvx_evals.long.task import Sample
from rwkvx_evals.models.own import OwnModel

NEEDLE = {"needle": TASKS["needle"]}


def answers(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def model() -> CountingModel:
    return tiny_model()


@pytest.fixture(scope="module")
def plain(model: CountingModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that all others must equal: each sample alone."""
    out = tmp_path_factory.mktemp("plain")
    ask(OwnModel(model), out, batch=1, share=False)
    return out


def test_an_oracle_is_always_right(tmp_path: Path) -> None:
    found = ask(oracle(), tmp_path, tasks=NEEDLE)
    task = found["tasks"]["needle"]
    assert task["lengths"]["600"] | {"stderr": 0, "low": 0} == {
        "score": 1.0, "stderr": 0, "low": 0, "high": 1.0, "asked": 10, "scored": 10, "failed": 0,
        "skipped": 0, "oom": 0, "invalid": 0, "error": 0, "truncated": 0,
    }  # fmt: skip
    assert task["effective_length"] == 1200
    assert len(task["depths"]) == 20
    row = answers(tmp_path)[0]
    assert row["answer"].strip() == row["expected"][0]
    assert row["prompt_tokens"] == 592


def test_answers_are_those_of_plain_reading(model: CountingModel, plain: Path) -> None:
    for row in answers(plain)[::7]:
        task = TASKS[row["task"]]
        sample = task.sample(SmallWriter(model.tokenizer), row["length"], row["index"])
        ids = sample.ids.tolist()
        with torch.no_grad():
            for _ in range(task.answer_tokens):
                logits, _ = model(torch.tensor([ids]), logits="last")
                ids.append(int(logits[0, 0].argmax()))
        text = model.tokenizer.decode(ids[len(sample.ids) :])
        assert text.startswith(row["answer"])
        assert sample.sha256 == row["prompt"]


@pytest.mark.parametrize("more", [{}, {"batch": 8}, {"batch": 3}, {"batch": 8, "share": False}])
def test_batches_and_sharing_change_nothing(
    model: CountingModel, plain: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    tasks = dict(reversed(TASKS.items()))
    ask(OwnModel(model), tmp_path, tasks=tasks, **more)
    assert answers(tmp_path) == answers(plain)


def test_what_is_asked_beside_a_task_changes_nothing(
    model: CountingModel, plain: Path, tmp_path: Path
) -> None:
    ask(OwnModel(model), tmp_path, tasks={"noise": TASKS["noise"]}, lengths=(1200,), samples=4)
    wanted = [r for r in answers(plain) if (r["task"], r["length"]) == ("noise", 1200)][:4]
    assert answers(tmp_path) == wanted


def test_a_prefix_is_read_once(tmp_path: Path) -> None:
    model = oracle()
    samples = {"tasks": NEEDLE, "lengths": (4096,), "samples": 50}
    found = ask(model, tmp_path, **samples)
    tokens = found["prompt_tokens"]
    assert tokens["without_sharing"] == 50 * 4088
    generated = sum(row["answer_tokens"] for row in answers(tmp_path))
    assert model.model.tokens_read <= tokens["read"] + 50 * 8
    assert model.model.tokens_read >= tokens["read"] + generated - 50
    # Half of 50 prompts and one whole, and each branch up to one quantum earlier.
    assert tokens["read"] < (26 * 4096 + 50 * QUANTUM * 1.5)


def test_answers_are_made_together_wherever_prompts_branch(tmp_path: Path) -> None:
    model = oracle()
    ask(model, tmp_path, tasks=NEEDLE, lengths=(600,))
    assert max(model.model.rows_seen) == 10
    pairs = oracle()
    ask(pairs, tmp_path / "pairs", tasks=NEEDLE, lengths=(600,), batch=2)
    assert max(pairs.model.rows_seen) == 2


def test_hashes_find_what_prompts_share() -> None:
    draw = np.random.default_rng(3)
    a = draw.integers(0, 50_000, 1000)
    b = a.copy()
    b[700] += 1
    assert common(prefix_hashes(a), prefix_hashes(b)) == 700 // QUANTUM * QUANTUM
    assert common(prefix_hashes(a), prefix_hashes(a)) == 999 // QUANTUM * QUANTUM
    assert common(prefix_hashes(a), prefix_hashes(a[:640])) == 640 - QUANTUM
    assert common(prefix_hashes(a), prefix_hashes(a[1:])) == 0
    assert common(prefix_hashes(a[:64]), prefix_hashes(a)) == 0
    # The same tokens in another order within a quantum.
    b = a.copy()
    b[[3, 4]] = a[[4, 3]]
    assert common(prefix_hashes(a), prefix_hashes(b)) == 0


def test_the_tree_holds_every_prompt_once() -> None:
    draw = np.random.default_rng(4)
    base = draw.integers(0, 99, 5000)
    prompts = {}
    for number in range(40):
        ids = base.copy()
        at = int(draw.integers(0, 5000))
        ids[at:] = draw.integers(0, 99, 5000 - at)
        prompts[str(number)] = ids
    hashes = {name: prefix_hashes(ids) for name, ids in prompts.items()}
    tree = prefix_tree(hashes, 5000)
    assert sorted(tree.members()) == sorted(prompts)
    stack = [tree]
    while stack:
        node = stack.pop()
        members = [prompts[name][: node.depth] for name in node.members()]
        assert all(np.array_equal(ids, members[0]) for ids in members)
        assert all(child.depth > node.depth for child in node.children)
        stack += node.children
    lengths = dict.fromkeys(prompts, 5000)
    assert tree.tokens(lengths) < 0.6 * 40 * 5000
    short = prefix_tree(hashes, 5000, longest_tail=256)
    assert short.tokens(lengths) > tree.tokens(lengths)


def test_memory_for_one_row_is_enough(tmp_path: Path) -> None:
    model = oracle(batch_limit=1)
    found = ask(model, tmp_path, samples=4)
    assert found["total"]["failed"] == 0
    assert max(model.model.rows_seen) > 1
    ask(oracle(), tmp_path / "whole", samples=4)
    assert answers(tmp_path) == answers(tmp_path / "whole")


def test_no_memory_at_one_length_leaves_the_others(tmp_path: Path) -> None:
    found = ask(oracle(oom_at=1000), tmp_path, samples=3)
    cell = found["tasks"]["needle"]["lengths"]["1200"]
    assert (cell["asked"], cell["scored"], cell["oom"], cell["score"]) == (3, 0, 3, None)
    assert found["tasks"]["needle"]["lengths"]["600"]["score"] == 1.0
    assert found["tasks"]["needle"]["effective_length"] == 600
    # It is tried again by the next start, and then answered.
    assert ask(oracle(), tmp_path, samples=3)["total"]["oom"] == 0


class Hungry(Oracle):
    """Runs out of memory while a second state is held, as a cache that hardly fits does."""

    def __call__(self, ids_BT: Any, state: Any = None, logits: str = "all") -> Any:
        if state is not None and state.ids_BT.shape[1] > 700 and logits == "last":
            raise MemoryError
        return super().__call__(ids_BT, state, logits)


def test_what_does_not_fit_beside_other_states_is_asked_alone(tmp_path: Path) -> None:
    from oracle import HistoryTools

    class Whole(Hungry):
        def __call__(self, ids_BT: Any, state: Any = None, logits: str = "all") -> Any:
            if ids_BT.shape[1] == 1:
                return Oracle.__call__(self, ids_BT, state, logits)
            return super().__call__(ids_BT, state, logits)

    model = OwnModel(Whole(), "oracle", tools=HistoryTools())
    found = ask(model, tmp_path, tasks=NEEDLE)
    assert found["total"]["oom"] == 0
    assert found["tasks"]["needle"]["lengths"]["1200"]["score"] == 1.0


def test_not_a_number_is_invalid_and_not_wrong(tmp_path: Path) -> None:
    found = ask(oracle(nan_at=1000), tmp_path)
    assert found["total"]["invalid"] == 20
    assert found["tasks"]["needle"]["lengths"]["1200"]["score"] is None
    # It is no accident of that day: it stays.
    again = oracle()
    assert ask(again, tmp_path)["total"]["invalid"] == 20
    assert again.model.tokens_read == 0


def test_a_second_start_computes_nothing(tmp_path: Path) -> None:
    ask(oracle(), tmp_path, batch=1)
    before = (tmp_path / "results.json").read_bytes()
    again = oracle()
    ask(again, tmp_path, batch=1)
    assert again.model.tokens_read == 0
    assert (tmp_path / "results.json").read_bytes() == before
    more = oracle()
    assert ask(more, tmp_path, samples=11, batch=1)["total"]["asked"] == 44
    assert 0 < more.model.tokens_read < 3 * (600 + 1200)


@pytest.mark.parametrize("keep", [0, 7, 23])
def test_resuming_from_a_cut_journal(
    model: CountingModel, plain: Path, tmp_path: Path, keep: int
) -> None:
    ask(OwnModel(model), tmp_path)
    (shard,) = (tmp_path / "journal").glob("*.jsonl")
    lines = shard.read_bytes().splitlines(keepends=True)
    shard.write_bytes(b"".join(lines[:keep]) + lines[keep][:30])
    ask(OwnModel(model), tmp_path)
    assert answers(tmp_path) == answers(plain)


def test_a_folder_belongs_to_one_model_and_setting(tmp_path: Path) -> None:
    ask(oracle(), tmp_path)
    with pytest.raises(InputError, match="holds results of other weights"):
        ask(oracle(memory=700), tmp_path)
    with pytest.raises(InputError, match=r"other settings \(seed: 0, not 1\)"):
        ask(oracle(), tmp_path, settings=Settings(seed=1))
    mark = json.loads((tmp_path / MARK).read_text())
    mark["settings"]["code"] = "0123456789"
    (tmp_path / MARK).write_text(json.dumps(mark))
    with pytest.raises(InputError, match=r"other settings \(code: 0123456789, not"):
        ask(oracle(), tmp_path)
    (tmp_path / MARK).unlink()
    with pytest.raises(InputError, match="holds other files"):
        ask(oracle(), tmp_path)


def limited(length: int) -> OwnModel:
    model = oracle()
    model.max_length = length
    return model


def test_what_is_too_long_is_skipped_and_counted(tmp_path: Path) -> None:
    model = limited(1000)
    found = ask(model, tmp_path)
    assert found["total"]["skipped"] == 20
    cell = found["tasks"]["needle"]["lengths"]["1200"]
    assert (cell["asked"], cell["skipped"], cell["score"]) == (0, 10, None)
    assert "1200 tokens are more than the 1000" in found["tasks"]["needle"]["reasons"][0]
    nothing = limited(500)
    with pytest.raises(InputError, match="cannot be asked at any of these lengths"):
        ask(nothing, tmp_path / "none")
    assert nothing.model.tokens_read == 0


@pytest.mark.parametrize("how", ["left", "middle"])
def test_truncation_is_asked_for_and_said(tmp_path: Path, how: str) -> None:
    found = ask(limited(1000), tmp_path, settings=Settings(truncate=how))
    assert found["total"]["truncated"] == 20
    assert found["settings"]["truncate"] == how
    row = next(r for r in answers(tmp_path) if r["length"] == 1200)
    assert row["truncated"] == 200
    assert row["prompt_tokens"] <= 1000


def test_cutting() -> None:
    ids = np.arange(10)
    assert cut(ids, 4, "left").tolist() == [6, 7, 8, 9]
    assert cut(ids, 5, "middle").tolist() == [0, 1, 7, 8, 9]
    assert cut(ids, 1, "middle").tolist() == [9]


class Moody(Needle):
    """Makes another prompt every time."""

    made = 0

    def sample(self, writer: Any, length: int, index: int) -> Sample:
        Moody.made += 1
        return super().sample(SmallWriter(writer.tokenizer, seed=Moody.made), length, index)


def test_a_task_that_is_no_function_of_its_seed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="made another sample"):
        ask(oracle(), tmp_path, tasks={"needle": Moody()}, samples=20)


class Generous(Noise):
    def score(self, answer: str, sample: Sample) -> float:
        return 7.0


def test_a_score_outside_0_to_1_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="score of 7"):
        ask(oracle(), tmp_path, tasks={"noise": Generous()})


def test_bad_numbers(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="batch must be"):
        ask(oracle(), tmp_path, batch=0)
    with pytest.raises(InputError, match="samples must be"):
        ask(oracle(), tmp_path, samples=0)
    with pytest.raises(InputError, match="at least 247"):
        ask(oracle(), tmp_path, lengths=(100,), tasks=NEEDLE)


def test_a_plan_does_not_keep_prompts() -> None:
    plan = Plan(TASKS, (600, 1200), 20, SmallWriter(), Target("w"), Settings(), batch=2)
    held = plan._made.cache_info().currsize
    assert held <= 2
    assert len(plan.questions) == 80
