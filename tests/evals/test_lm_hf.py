"""Plain lm-eval, `--model hf`, on a saved folder: the scores of `--model rwkvx`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model

from rwkvx.checkpoint.folder import save_folder
from rwkvx.data.folder import data_folder

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from rwkvx_evals.lm.model import RwkvxLM
from rwkvx_evals.lm.tasks import load_tasks

TASKS = ["piqa", "lambada_openai"]
ITEMS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_folder(tiny_model(), path)
    return path


def evaluate(model: Any, **more: Any) -> dict[str, Any]:
    data = data_folder(None)
    assert data is not None
    found = lm_eval.simple_evaluate(
        model, tasks=load_tasks(TASKS, data).tasks, limit=ITEMS, bootstrap_iters=0,
        log_samples=True, task_manager=TaskManager(include_defaults=False), **more,
    )  # fmt: skip
    assert found is not None
    return dict(found)


def test_scores_of_real_items(folder: Path) -> None:
    if data_folder(None) is None:
        pytest.skip("RWKVX_DATA is not set")
    ours = evaluate(RwkvxLM(str(folder), quiet=True))
    arguments = f"pretrained={folder},trust_remote_code=True,dtype=float32"
    theirs = evaluate("hf", model_args=arguments, batch_size=4, device="cpu")
    for task in TASKS:
        pairs = zip(ours["samples"][task], theirs["samples"][task], strict=True)
        for own, hf in pairs:
            assert own["doc_id"] == hf["doc_id"]
            for (a, greedy_a), (b, greedy_b) in zip(
                own["filtered_resps"], hf["filtered_resps"], strict=True
            ):
                assert a == pytest.approx(b, abs=1e-3)
                assert greedy_a == greedy_b
        for metric, value in ours["results"][task].items():
            if isinstance(value, float):
                assert theirs["results"][task][metric] == pytest.approx(value, rel=1e-5), metric


def test_generation_and_the_maximum_length(folder: Path) -> None:
    """Prompts of unequal lengths in one batch, padded by lm-eval on the left."""
    options = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    prompts = ["abc", "The cat sat on the mat and then", "x", "The dog"]
    requests = [
        Instance("generate_until", {}, (prompt, options), index, ("task", index, 1))  # type: ignore[arg-type]
        for index, prompt in enumerate(prompts)
    ]
    theirs = HFLM(
        pretrained=str(folder), trust_remote_code=True, dtype="float32", batch_size=4, device="cpu"
    )
    ours = RwkvxLM(str(folder), quiet=True).generate_until(requests)
    assert theirs.generate_until(requests, disable_tqdm=True) == ours


def probed(folder: Path, monkeypatch: pytest.MonkeyPatch, **more: Any) -> list[tuple[int, ...]]:
    """Shapes that lm-eval tries when it is to find the batch size of a generating task."""
    model = HFLM(
        pretrained=str(folder), trust_remote_code=True, dtype="float32", batch_size="auto",
        device="cpu", **more,
    )  # fmt: skip
    shapes: list[tuple[int, ...]] = []

    def record(inputs: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        shapes.append(tuple(inputs.shape))
        return torch.zeros(1, 1, 256)

    with monkeypatch.context() as patch:
        patch.setattr(model, "_model_call", record)
        options = {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}
        request = Instance("generate_until", {}, ("The cat", options), 0, ("task", 0, 1))  # type: ignore[arg-type]
        found = model.generate_until([request], disable_tqdm=True)
    assert found == RwkvxLM(str(folder), quiet=True).generate_until([request])
    return shapes


def test_automatic_batches(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval tries 64 rows of the maximum length, or of `max_length`, five times over."""
    assert probed(folder, monkeypatch) == [(64, 8192)] * 5
    assert probed(folder, monkeypatch, max_length=64, max_batch_size=2) == [(2, 64)] * 5
    config = json.loads((folder / "config.json").read_text())
    other = folder.with_name("longer")
    shutil.copytree(folder, other)
    (other / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 65536}))
    assert HFLM(pretrained=str(other), trust_remote_code=True, device="cpu").max_length == 65536


def test_longer_prompts_are_cut_with_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What lm-eval's `hf` does beyond its maximum length; `--model rwkvx` reads all of it."""
    short = HFLM(
        pretrained=str(folder), trust_remote_code=True, dtype="float32", max_length=24, device="cpu"
    )
    options = {"until": [], "max_gen_toks": 4, "do_sample": False}
    request = Instance("generate_until", {}, ("x" * 40 + " The cat", options), 0, ("task", 0, 1))  # type: ignore[arg-type]
    with caplog.at_level("WARNING", logger="lm_eval"):
        cut = short.generate_until([request], disable_tqdm=True)
    assert "Left truncation applied" in caplog.text
    own = RwkvxLM(str(folder), quiet=True, max_length=24, truncate="left")
    assert own.generate_until([request]) == cut
    assert own.counts["truncated"] == 1
