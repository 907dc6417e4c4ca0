"""The adapter as a `PreTrainedModel`, after the list of transformers' ModelTesterMixin.

Left out, each with its reason:
- attention outputs and implementations (eager, sdpa, flash): there are no attention matrices and
  no exchangeable attention function; chunk attention is part of the model.
- 4D masks, head pruning, feed-forward chunking: the model has no such arguments. Refusal of 4D
  masks: `test_batches.py`.
- tied weights: embedding and head are never tied.
- data, tensor and model parallelism, offloading to disk: they need accelerators.
- sequence classification and other heads: only the causal language model is there.
- torch.compile, torch.export: the state is a Python object with lengths that change every call.
"""

import inspect

import pytest
import torch
from adapters import CONFIG, adapter, core, padded, prompts
from small import error
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils.peft_utils import check_peft_version

from rwkvx import init_weights
from rwkvx.hf import RwkvxConfig, RwkvxForCausalLM
from rwkvx.model import Model

IDS = torch.cat(prompts(lengths=[60, 60]))


@pytest.fixture
def hf() -> RwkvxForCausalLM:
    return adapter()


def test_logits_are_the_core_s(hf: RwkvxForCausalLM) -> None:
    assert torch.equal(hf(IDS).logits, core(hf)(IDS)[0])
    assert torch.equal(hf(IDS).logits, hf(IDS).logits)


def test_signature() -> None:
    """The order in which transformers passes positional arguments."""
    names = list(inspect.signature(RwkvxForCausalLM.forward).parameters)
    assert names[1:5] == ["input_ids", "attention_mask", "position_ids", "past_key_values"]
    assert RwkvxForCausalLM.main_input_name == "input_ids"


def test_initialisation_is_the_models_own() -> None:
    """`from_config` gives RWKV-7's initial values, and draws them from torch's generator."""
    torch.manual_seed(5)
    hf = AutoModelForCausalLM.from_config(RwkvxConfig(**CONFIG.to_dict()))
    torch.manual_seed(5)
    expected = init_weights(Model(CONFIG), int(torch.randint(1 << 31, ()))).state_dict()
    assert {n: x.shape for n, x in hf.model.state_dict().items()} == {
        n: x.shape for n, x in expected.items()
    }
    for name, x in hf.model.state_dict().items():
        assert torch.equal(x, expected[name]), name
    assert not torch.equal(
        AutoModelForCausalLM.from_config(hf.config).model.emb.weight, expected["emb.weight"]
    )
    half = AutoModelForCausalLM.from_config(hf.config, dtype=torch.bfloat16)
    assert {x.dtype for x in half.parameters()} == {torch.bfloat16}
    with torch.device("meta"):
        assert RwkvxForCausalLM(hf.config).model.emb.weight.is_meta


@pytest.mark.parametrize("side", ["left", None])
def test_hidden_states(hf: RwkvxForCausalLM, side: str | None) -> None:
    """Embeddings, each block's output, the last one normalised; they carry gradients."""
    batch = padded(prompts(lengths=[60, 20]), side) if side else {"input_ids": IDS}
    out = hf(**batch, output_hidden_states=True, use_cache=False)
    assert len(out.hidden_states) == hf.config.num_hidden_layers + 1
    assert {x.shape for x in out.hidden_states} == {(2, 60, 32)}
    assert torch.equal(core(hf).head(out.hidden_states[-1]), out.logits)
    if side is None:
        assert torch.equal(out.hidden_states[0], core(hf).ln0(core(hf).emb(IDS)))
        for x in out.hidden_states:
            x.retain_grad()
        out.logits.sum().backward()
        assert all(x.grad.any() for x in out.hidden_states)
    hf.config.output_hidden_states = True
    assert hf(IDS).hidden_states is not None
    with torch.no_grad():  # long inputs are read in segments
        long = torch.cat(prompts(lengths=[5000]))
        assert hf(long).hidden_states[2].shape == (1, 5000, 32)


def test_tuples_are_the_same(hf: RwkvxForCausalLM) -> None:
    named = hf(IDS, labels=IDS, output_hidden_states=True)
    plain = hf(IDS, labels=IDS, output_hidden_states=True, return_dict=False)
    assert isinstance(plain, tuple)
    assert torch.equal(plain[0], named.loss)
    assert torch.equal(plain[1], named.logits)


def test_embeddings_in_place_of_ids(hf: RwkvxForCausalLM) -> None:
    embedded = hf.get_input_embeddings()(IDS)
    assert torch.equal(hf(inputs_embeds=embedded).logits, hf(IDS).logits)
    batch = padded(prompts(lengths=[60, 20]), "left")
    expected = hf(**batch).logits
    batch["inputs_embeds"] = hf.get_input_embeddings()(batch.pop("input_ids"))
    assert error(hf(**batch).logits, expected) < 1e-12


@pytest.mark.parametrize("keep", [1, 7, torch.tensor([3, -1])], ids=str)
def test_logits_to_keep(hf: RwkvxForCausalLM, keep: int | Tensor) -> None:
    every = hf(IDS).logits
    expected = every[:, -keep:] if isinstance(keep, int) else every[:, keep]
    assert error(hf(IDS, logits_to_keep=keep).logits, expected) < 1e-12


def test_loss(hf: RwkvxForCausalLM) -> None:
    labels = IDS.clone()
    labels[0, :30] = -100
    out = hf(IDS, labels=labels)
    logprobs = out.logits.log_softmax(-1)[:, :-1].gather(2, IDS[:, 1:, None])[..., 0]
    scored = labels[:, 1:] != -100
    assert out.loss.item() == pytest.approx(-float(logprobs[scored].mean()), rel=1e-5)
    total = hf(IDS, labels=labels, num_items_in_batch=10).loss  # what Trainer passes
    assert total.item() == pytest.approx(-float(logprobs[scored].sum()) / 10, rel=1e-5)


def test_embeddings_can_be_read_and_replaced(hf: RwkvxForCausalLM) -> None:
    assert hf.get_input_embeddings() is core(hf).emb
    assert hf.get_output_embeddings() is core(hf).head
    new = nn.Embedding(256, 32)
    hf.set_input_embeddings(new)
    assert core(hf).emb is new
    head = nn.Linear(32, 256, bias=False)
    hf.set_output_embeddings(head)
    assert core(hf).head is head


def test_the_vocabulary_can_grow_and_shrink() -> None:
    hf = adapter(torch.float32)
    before = hf(IDS).logits
    hf.resize_token_embeddings(260)
    assert hf.config.vocab_size == core(hf).config.vocab_size == 260
    out = hf(IDS).logits
    assert out.shape[-1] == 260
    assert torch.equal(out[..., :256], before)
    assert hf(torch.tensor([[259]])).logits.isfinite().all()
    hf.resize_token_embeddings(100)
    small = IDS.clamp(max=99)
    assert torch.equal(hf(small).logits, adapter(torch.float32)(small).logits[..., :100])


@pytest.mark.parametrize("padding", [False, True])
def test_gradient_checkpointing(hf: RwkvxForCausalLM, padding: bool) -> None:
    """The same loss and gradients, and blocks that are computed twice."""
    batch = padded(prompts(lengths=[60, 20]), "left") if padding else {"input_ids": IDS}
    hf.train()
    calls, gradients = [0], []
    core(hf).blocks[1].register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    for switch in (lambda: None, hf.gradient_checkpointing_enable):
        switch()
        calls[0] = 0
        hf(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append([p.grad.clone() for p in hf.parameters()])
        assert calls[0] == 1 + hf.is_gradient_checkpointing
        hf.zero_grad()
    for a, b in zip(*gradients, strict=True):
        assert error(a, b) < 1e-11
    hf.gradient_checkpointing_disable()
    calls[0] = 0
    hf(**batch, labels=batch["input_ids"]).loss.backward()
    assert calls[0] == 1


def test_training_makes_no_cache_unless_asked(hf: RwkvxForCausalLM) -> None:
    assert hf(IDS).past_key_values is not None
    assert hf.train()(IDS).past_key_values is None
    assert hf(IDS, use_cache=True).past_key_values is not None
    hf.eval()
    hf.config.use_cache = False
    assert hf(IDS).past_key_values is None


def test_all_parameters_learn() -> None:
    """The loss of a text falls to nothing: every parameter gets a gradient, and it is right."""
    hf = adapter(torch.float32).train()
    optimizer = torch.optim.Adam(hf.parameters(), lr=1e-2)
    for _ in range(30):
        loss = hf(IDS[:1], labels=IDS[:1]).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in hf.parameters())
        optimizer.step()
    first = adapter(torch.float32)(IDS[:1], labels=IDS[:1]).loss
    assert loss < 0.2 * first


def test_state_dict_round_trip(hf: RwkvxForCausalLM, tmp_path: object) -> None:
    other = RwkvxForCausalLM(hf.config).double().eval()
    assert not torch.equal(other(IDS).logits, hf(IDS).logits)
    other.load_state_dict(hf.state_dict())
    assert torch.equal(other(IDS).logits, hf(IDS).logits)
    assert not list(hf.buffers())


LORA = ["receptance", "key", "value", "output"]


def lora(hf: RwkvxForCausalLM, **more: object) -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=LORA, task_type="CAUSAL_LM", **more)
    model: nn.Module = peft.get_peft_model(hf, config)
    return model


@pytest.mark.parametrize("prepare", ["plain", "gradient_checkpointing_enable"])
def test_lora_trains_and_merges(tmp_path: object, prepare: str) -> None:
    """On the projections of both mixers and of the channel mix."""
    hf = adapter(torch.float32)
    before = hf(IDS).logits.detach()
    model = lora(hf)
    if prepare != "plain":
        getattr(model, prepare)()
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * (4 * 4 + 4 * 2)  # A and B: 4 mixers with 4, 4 channel mixes with 2
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    losses = []
    for _ in range(15):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    model.eval()
    with torch.no_grad():
        after = model(input_ids=IDS).logits
        generated = model.generate(input_ids=IDS, do_sample=False, max_new_tokens=5)
        assert error(after, before) > 1e-2
        with model.disable_adapter():
            assert error(model(input_ids=IDS).logits, before) < 1e-5
        model.save_pretrained(tmp_path)
        again = pytest.importorskip("peft").PeftModel.from_pretrained(
            adapter(torch.float32), tmp_path
        )
        assert error(again(input_ids=IDS).logits, after) < 1e-6
        merged = model.merge_and_unload()
        assert isinstance(merged, RwkvxForCausalLM)
        assert error(merged(IDS).logits, after) < 1e-5
        assert torch.equal(merged.generate(IDS, do_sample=False, max_new_tokens=5), generated)
        merged.save_pretrained(f"{tmp_path}/merged")
        loaded = AutoModelForCausalLM.from_pretrained(f"{tmp_path}/merged")
        assert torch.equal(loaded(IDS).logits, merged(IDS).logits)


def test_adapters_through_transformers_own_interface(tmp_path: object) -> None:
    peft = pytest.importorskip("peft")
    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError as reason:  # transformers may ask for one that is not out yet
        pytest.skip(str(reason))
    hf = adapter(torch.float32)
    before = hf(IDS).logits.detach()
    hf.add_adapter(peft.LoraConfig(r=4, target_modules=LORA, init_lora_weights=False))
    after = hf(IDS).logits.detach()
    assert error(after, before) > 1e-3
    hf.save_pretrained(tmp_path)
    hf.disable_adapters()
    assert error(hf(IDS).logits, before) < 1e-5
    other = adapter(torch.float32)
    other.load_adapter(tmp_path)
    assert error(other(IDS).logits, after) < 1e-6
