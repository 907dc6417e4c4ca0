"""Hugging Face models: their own caches, forked, cropped or copied; frames; what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_models import bpe_tokenizer, save_model
from needles import TASKS, Noise, SmallWriter, ask

from rwkvx.errors import InputError
from rwkvx_evals.long.plan import Settings
from rwkvx_evals.long.task import Sample
from rwkvx_evals.models.frames import frame_of
from rwkvx_evals.models.hugging_face import TOLERANCE, HuggingFaceModel, load_hugging_face
from rwkvx_evals.models.reader import Frame


class Questions(Noise):
    """One document of random letters for all samples, with a question of some letters."""

    def sample(self, writer: SmallWriter, length: int, index: int) -> Sample:
        made = super().sample(writer, length, 0)
        ids = made.ids.copy()
        ids[-20:] = np.random.default_rng(index).integers(5, 300, 20)
        text = writer.tokenizer.decode(ids[1:].tolist())
        return Sample(f"questions-{length}-{index}", ids, text, ("a",))


ALL = {**TASKS, "questions": Questions("questions")}
SMALL: dict[str, Any] = {"tasks": ALL, "lengths": (200, 400), "samples": 4}


def answers(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def assert_close(found: torch.Tensor | None, wanted: torch.Tensor | None) -> None:
    """Within what the reader itself takes for rounding."""
    assert found is not None
    assert wanted is not None
    assert (found - wanted).abs().max() <= TOLERANCE[wanted.dtype] * wanted.abs().max()


@pytest.fixture(scope="module", params=["llama", "mamba"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = save_model(request.param, tmp_path_factory.mktemp(request.param))
    return load_hugging_face(folder, device="cpu", dtype="float32")


def test_what_the_caches_can_do(model: HuggingFaceModel) -> None:
    llama = model.model.config.model_type == "llama"
    assert model.max_length == (4096 if llama else None)
    # transformers' Mamba starts anew where several tokens are read onto a state.
    assert model.continues is llama
    assert model.end_ids == {1}
    assert model.frame == Frame((0,), start=1)


@torch.inference_mode()
def test_a_branch_leaves_its_state_as_it_was(model: HuggingFaceModel) -> None:
    ids = torch.randint(4, 300, (1, 60), generator=torch.Generator().manual_seed(1))
    whole, _ = model.read(ids, None, "all")
    assert whole is not None
    _, state = model.read(ids[:, :40], None, "none")
    for rows in (1, 3, 1):
        with model.branch(state, rows) as fork:
            logits, fork = model.read(ids[:, 40:50].expand(rows, -1), fork, "last")
            assert logits is not None
            assert_close(logits[:, 0], whole[:, 49].expand(rows, -1))
            step = model.steps(fork, 3)
            more = step(ids[:, 50:51].expand(rows, -1))
            assert_close(more[:, 0], whole[:, 50].expand(rows, -1))
    rest, _ = model.read(ids[:, 40:], state, "all")
    assert_close(rest, whole[:, 40:])


@torch.inference_mode()
def test_memory_that_runs_out_in_a_branch(model: HuggingFaceModel) -> None:
    ids = torch.randint(4, 300, (1, 60), generator=torch.Generator().manual_seed(2))
    whole, _ = model.read(ids, None, "last")
    _, state = model.read(ids[:, :40], None, "none")
    last = list(model.model.modules())[-2]  # late enough for some layers to have read

    def refuse(*_: Any) -> None:
        raise MemoryError

    hook = last.register_forward_hook(refuse)
    with pytest.raises(MemoryError), model.branch(state, 1) as fork:
        model.read(ids[:, 40:], fork, "last")
    hook.remove()
    again, _ = model.read(ids[:, 40:], state, "last")
    assert_close(again, whole)


@torch.inference_mode()
def test_logits_in_slices(model: HuggingFaceModel) -> None:
    ids = torch.randint(4, 300, (2, 50), generator=torch.Generator().manual_seed(3))
    whole, _ = model.read(ids, None, "all")
    assert whole is not None
    found = list(model.logits_in_slices(ids, 7, 16))
    assert max(part.shape[1] for part in found) == 16
    assert_close(torch.cat(found, dim=1), whole[:, 7:])


def test_batches_and_sharing_change_nothing(model: HuggingFaceModel, tmp_path: Path) -> None:
    found = ask(model, tmp_path / "plain", **SMALL, batch=1, share=False)
    assert found["prompt_tokens"]["read"] == found["prompt_tokens"]["without_sharing"]
    texts = {row["answer"] for row in answers(tmp_path / "plain")}
    assert len(texts) > 12
    assert bool(found["warnings"]) is not model.continues
    for number, more in enumerate(({}, {"batch": 1}, {"batch": 8})):
        out = tmp_path / str(number)
        found = ask(model, out, **SMALL, **more)
        assert answers(out) == answers(tmp_path / "plain")
        assert found["prompt_tokens"]["read"] < found["prompt_tokens"]["without_sharing"]


@torch.inference_mode()
def test_answers_are_those_of_generate(model: HuggingFaceModel, tmp_path: Path) -> None:
    ask(model, tmp_path, **SMALL)
    for row in answers(tmp_path)[::5]:
        task = ALL[row["task"]]
        sample = task.sample(SmallWriter(model.tokenizer), row["length"], row["index"])
        ids = torch.tensor([sample.ids.tolist()])
        assert ids[0, :2].tolist().count(0) == 1
        made = model.model.generate(
            ids, max_new_tokens=task.answer_tokens, do_sample=False, pad_token_id=1,
            attention_mask=torch.ones_like(ids),
        )  # fmt: skip
        new = [token for token in made[0, ids.shape[1] :].tolist() if token != 1]
        assert model.decode(new).startswith(row["answer"])
        assert row["prompt_tokens"] == ids.shape[1] == row["length"] - task.answer_tokens


def test_a_document_starts_once(tmp_path: Path) -> None:
    ids = np.array([0, 5, 6])
    assert Frame((0,), start=1).around(ids).tolist() == [0, 5, 6]
    assert Frame((0,), start=1).around(ids[1:]).tolist() == [0, 5, 6]
    assert Frame().around(ids).tolist() == [0, 5, 6]
    assert frame_of(bpe_tokenizer(bos=False)) == Frame()
    chat = frame_of(bpe_tokenizer(chat=True), chat=True)
    assert chat == Frame((0, 2), (3,), start=1)
    assert chat.around(ids).tolist() == [0, 2, 5, 6, 3]
    twice = bpe_tokenizer(chat=True)
    twice.chat_template = "{{ bos_token }}" + twice.chat_template
    with pytest.raises(InputError, match="starts 2 documents"):
        frame_of(twice, chat=True)
    with pytest.raises(InputError, match="no chat template"):
        frame_of(bpe_tokenizer(), chat=True)


def test_a_chat_template_is_part_of_the_length(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path / "chat", chat=True)
    model = load_hugging_face(folder, device="cpu", dtype="float32", chat=True)
    out = tmp_path / "out"
    ask(model, out, tasks={"noise": TASKS["noise"]}, lengths=(300,), settings=Settings(chat=True))
    assert {row["prompt_tokens"] for row in answers(out)} == {295}


def test_a_limit_of_the_config(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path / "model")
    model = load_hugging_face(folder, device="cpu", dtype="float32", max_length=300)
    found = ask(model, tmp_path / "out", **SMALL)
    assert found["total"]["skipped"] == 12
    with pytest.raises(InputError, match="more than the 300 of the model"):
        ask(model, tmp_path / "none", **(SMALL | {"lengths": (400,)}))


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path / "model")
    with pytest.raises(InputError, match="int8"):
        load_hugging_face(folder, device="cpu", dtype="int8")
    (folder / "model.safetensors").write_bytes(b"rubbish")
    with pytest.raises(InputError, match="transformers cannot load"):
        load_hugging_face(folder, device="cpu", dtype="float32")


def test_not_a_number(tmp_path: Path) -> None:
    model = load_hugging_face(
        save_model("llama", tmp_path / "model"), device="cpu", dtype="float32"
    )
    with torch.no_grad():
        model.model.lm_head.weight[5] = float("nan")
    found = ask(model, tmp_path / "out", **SMALL)
    assert found["total"]["invalid"] == found["total"]["asked"] == 24
