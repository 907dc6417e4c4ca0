"""Files carry the names of the module's parameters, for everything that loads them by itself."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import CONFIG, adapter, padded, prompts
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import rwkvx
from rwkvx.checkpoint.folder import save_folder
from rwkvx.errors import InputError
from rwkvx.hf import RwkvxConfig, RwkvxForCausalLM


@pytest.fixture(scope="module")
def trained() -> RwkvxForCausalLM:
    return adapter(torch.float32)


@pytest.mark.parametrize("saved_by", ["ours", "theirs"])
def test_a_file_s_names_are_the_module_s(
    trained: RwkvxForCausalLM, tmp_path: Path, saved_by: str
) -> None:
    if saved_by == "ours":
        save_folder(trained.model, tmp_path)
    else:
        trained.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert set(tensors) == set(trained.state_dict()) == set(trained.model.state_dict())
    fresh = RwkvxForCausalLM(RwkvxConfig(**CONFIG.to_dict()))
    result = fresh.load_state_dict(tensors, strict=False)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert fresh.model.fingerprint() == trained.model.fingerprint()


def test_a_dtype_that_is_too_narrow_is_refused(tmp_path: Path) -> None:
    """Whoever casts: transformers does it by itself."""
    model = adapter(torch.float32)
    model.model.blocks[0].ffn.key.weight.data[3, 5] = 1e5
    model.save_pretrained(tmp_path)
    assert RwkvxForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(InputError, match=r"blocks.0.ffn.key.weight .* float16: try dtype bfloat16"):
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)


def test_accelerate_loads_a_file_by_name(trained: RwkvxForCausalLM, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    save_folder(trained.model, tmp_path)
    with accelerate.init_empty_weights():
        empty = RwkvxForCausalLM(RwkvxConfig(**CONFIG.to_dict()))
    accelerate.load_checkpoint_in_model(empty, str(tmp_path), device_map={"": "cpu"})
    assert empty.model.fingerprint() == trained.model.fingerprint()


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = torch.randint(1, 256, (24,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


def trainer(folder: Path, steps: int, **options: Any) -> Trainer:
    torch.manual_seed(0)
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=2, save_steps=2, seed=1,
        learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1,
        **options,
    )  # fmt: skip
    return Trainer(adapter(torch.float32), arguments, train_dataset=Rows(), eval_dataset=Rows())


def test_a_resumed_trainer_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", 4)
    whole.train()
    trainer(tmp_path / "parts", 2, lr_scheduler_type="constant").train()
    resumed = trainer(tmp_path / "whole2", 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, x in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], x), name


def test_the_best_checkpoint_is_loaded(tmp_path: Path) -> None:
    """With a rate that ruins the model after its first steps, the best is not the last."""
    run = trainer(
        tmp_path, 6, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    run.train()
    best = rwkvx.load(run.state.best_model_checkpoint)
    assert best.fingerprint() == run.model.model.fingerprint()


def test_parts_that_are_replaced_are_the_ones_that_run(trained: RwkvxForCausalLM) -> None:
    hf = copy.deepcopy(trained)
    ids = prompts()[0]
    before = hf(ids).logits
    hf.head = torch.nn.Linear(CONFIG.width, 7)
    assert hf(ids).logits.shape[-1] == 7
    assert torch.equal(trained(ids).logits, before)
    hf.resize_token_embeddings(300)
    assert hf.model.emb.weight.shape[0] == hf.model.config.vocab_size == 300
    hf(torch.tensor([[299]]))


def test_initial_weights_are_drawn_once(trained: RwkvxForCausalLM, tmp_path: Path) -> None:
    save_folder(trained.model, tmp_path)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path)
    hf.resize_token_embeddings(260)
    before = {name: x.clone() for name, x in hf.state_dict().items()}
    hf.init_weights()
    hf.post_init()
    hf.initialize_weights()
    for name, x in hf.state_dict().items():
        assert torch.equal(x, before[name]), name
    other = RwkvxForCausalLM(hf.config)
    other.load_state_dict(before, assign=True)
    other.init_weights()
    assert torch.equal(other.head.weight, before["head.weight"])


@pytest.mark.parametrize("side", ["left", "right", None])
def test_hidden_states_lie_on_the_path_to_the_logits(side: str | None) -> None:
    """As transformers' test_retain_grad_hidden_states_attentions."""
    hf = adapter()
    inputs = padded(prompts(), side) if side else {"input_ids": prompts()[0]}
    out = hf(**inputs, output_hidden_states=True, use_cache=False)
    for x in out.hidden_states:
        x.retain_grad()
    out.logits.sum().backward(retain_graph=True)
    for x in out.hidden_states:
        assert x.grad is not None
        assert x.grad.abs().sum() > 0


@torch.no_grad()
def test_caches_fork_while_they_decode(trained: RwkvxForCausalLM) -> None:
    ids = prompts()[3]
    expected = trained(ids).logits
    cache = trained(ids[:, :50], use_cache=True).past_key_values
    for t in range(50, 55):
        out = trained(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
    fork = copy.copy(cache)
    for one in (cache, fork):
        for t in range(55, 60):
            out = trained(ids[:, t : t + 1], past_key_values=one, use_cache=True)
            torch.testing.assert_close(out.logits[:, 0], expected[:, t], rtol=1e-3, atol=1e-3)
    assert cache.get_seq_length() == fork.get_seq_length() == 60
    assert cache.state.length == 60
