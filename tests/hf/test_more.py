"""Smaller items of transformers' lists (`docs/hf_tests.md`): loading, switches, stopping."""

from pathlib import Path

import pytest
import torch
from adapters import CONFIG, adapter, prompts
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from rwkvx.hf import RwkvxConfig, RwkvxForCausalLM

IDS = torch.cat(prompts(lengths=[60, 60]))


@pytest.fixture
def hf() -> RwkvxForCausalLM:
    return adapter(torch.float32)


def test_pickled_state_dicts(hf: RwkvxForCausalLM, tmp_path: Path) -> None:
    torch.save(hf.state_dict(), tmp_path / "weights.pt")
    other = RwkvxForCausalLM(hf.config).eval()
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(other(IDS).logits, hf(IDS).logits)


def test_loading_with_a_default_device(hf: RwkvxForCausalLM, tmp_path: Path) -> None:
    hf.save_pretrained(tmp_path)
    with torch.device("cpu"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(IDS).logits, hf(IDS).logits)


def test_every_tensor_is_a_parameter(hf: RwkvxForCausalLM) -> None:
    assert not list(hf.buffers())
    for module in hf.modules():
        assert not [name for name, x in vars(module).items() if isinstance(x, torch.Tensor)]


def test_the_config_names_every_size() -> None:
    config = RwkvxConfig(**CONFIG.to_dict())
    assert (config.vocab_size, config.hidden_size) == (256, 32)
    assert (config.num_attention_heads, config.num_hidden_layers) == (4, 4)
    config.hidden_size = 64
    assert config.width == 64


def test_frozen_weights_with_inputs_that_ask_for_gradients(hf: RwkvxForCausalLM) -> None:
    """What PEFT does before training with checkpoints: the embeddings pass gradients on."""
    hf.requires_grad_(False).train()
    hf.enable_input_require_grads()
    assert hf(IDS).logits.requires_grad
    hf.disable_input_require_grads()
    assert not hf(IDS).logits.requires_grad


@pytest.mark.parametrize("reentrant", [False, True])
def test_either_kind_of_checkpoint_may_be_asked_for(hf: RwkvxForCausalLM, reentrant: bool) -> None:
    """Ours is of the kind that is not reentrant, and leaves the gradients as they are."""
    hf.train()(IDS, labels=IDS).loss.backward()
    expected = [p.grad.clone() for p in hf.parameters()]
    hf.zero_grad()
    hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert hf.is_gradient_checkpointing
    hf(IDS, labels=IDS).loss.backward()
    for p, gradient in zip(hf.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-5)
    hf.gradient_checkpointing_disable()
    assert not hf.is_gradient_checkpointing


def test_labels_that_are_shifted_already(hf: RwkvxForCausalLM) -> None:
    shifted = torch.nn.functional.pad(IDS[:, 1:], (0, 1), value=-100)
    expected = hf(IDS, labels=IDS).loss
    found = hf(IDS, labels=IDS, shift_labels=shifted).loss
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    shifted[:, 10:] = -100
    assert hf(IDS, labels=IDS, shift_labels=shifted).loss.item() != pytest.approx(expected.item())


class AfterTwo(StoppingCriteria):
    """Rows end once they have two tokens more than the prompt."""

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= 62)


def test_stopping_criteria(hf: RwkvxForCausalLM) -> None:
    options = {"do_sample": False, "max_new_tokens": 9, "suppress_tokens": [0]}
    stopped = hf.generate(IDS, stopping_criteria=StoppingCriteriaList([AfterTwo()]), **options)
    assert torch.equal(stopped, hf.generate(IDS, **options)[:, :62])


def test_going_on_from_embeddings(hf: RwkvxForCausalLM) -> None:
    """The embeddings of the whole text beside the cache of its first part."""
    embedded = hf.get_input_embeddings()(IDS)
    options = {"do_sample": False, "max_new_tokens": 5, "suppress_tokens": [0]}
    with torch.no_grad():
        cache = hf(inputs_embeds=embedded[:, :40]).past_key_values
    found = hf.generate(inputs_embeds=embedded, past_key_values=cache, **options)
    assert torch.equal(found, hf.generate(IDS, **options)[:, 60:])
    assert cache.get_seq_length() == 64
