"""`generate()`, after the list of transformers' GenerationTesterMixin.

Left out, each with its reason:
- assisted decoding, prompt lookup: transformers refuses them for models with a recurrent state
  (`_is_stateful`), as a rejected draft cannot be taken back; that it refuses is tested.
- static, quantised and offloaded caches, compiled decoding: they store per-layer keys and values
  of `DynamicCache`'s kind; `StateCache` holds the state of this model. Asking for one is tested.
- attention matrices of a generation (`output_attentions`): none are ever formed; refused.
- model-parallel beam search: needs two GPUs.
"""

import copy

import pytest
import torch
from adapters import adapter, core, padded, prompts
from torch import Tensor
from transformers import GenerationMixin, pipeline

from rwkvx.hf import RwkvxForCausalLM, StateCache
from rwkvx.tokenizers import ByteTokenizer

NEW = 24  # from a prompt of 40 tokens: over the 48 tokens that are read densely
KEEP_GOING = {"min_new_tokens": NEW, "max_new_tokens": NEW}


@pytest.fixture(scope="module")
def hf() -> RwkvxForCausalLM:
    return adapter()


@torch.no_grad()
def greedy(hf: RwkvxForCausalLM, ids: Tensor, tokens: int = NEW) -> Tensor:
    """By whole sequences through the core, without any cache; id 0 is not to be chosen."""
    for _ in range(tokens):
        logits = core(hf)(ids)[0][:, -1]
        logits[:, 0] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])  # a tokenizer's, of ""
def test_a_prompt_without_tokens_begins_a_document(
    hf: RwkvxForCausalLM, dtype: torch.dtype
) -> None:
    empty = {"input_ids": torch.zeros(2, 0, dtype=dtype), "attention_mask": torch.zeros(2, 0)}
    out = hf.generate(**empty, do_sample=False, **KEEP_GOING)
    assert torch.equal(out, greedy(hf, torch.zeros(2, 1, dtype=torch.int64)))
    assert torch.equal(out[:1], hf.generate(do_sample=False, **KEEP_GOING))


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy(hf: RwkvxForCausalLM, use_cache: bool) -> None:
    ids = torch.cat(prompts(lengths=[40, 40]))
    out = hf.generate(ids, do_sample=False, use_cache=use_cache, **KEEP_GOING)
    assert torch.equal(out, torch.cat([greedy(hf, row[None]) for row in ids]))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 2.0},
        {"use_cache": False},
        {"prefill_chunk_size": 13},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    ],
    ids=str,
)
def test_left_padding_gives_the_results_of_single_prompts(
    hf: RwkvxForCausalLM, options: dict[str, object]
) -> None:
    rows = prompts(lengths=[70, 1, 17, 100])
    n = options.get("num_return_sequences", 1)
    together = hf.generate(**padded(rows, "left"), do_sample=False, **KEEP_GOING, **options)
    for i, row in enumerate(rows):
        if "repetition_penalty" in options:  # it looks at the padding, too
            break
        alone = hf.generate(row, do_sample=False, **KEEP_GOING, **options)
        assert torch.equal(together[n * i : n * (i + 1), -NEW:], alone[:, -NEW:])
    assert together.shape == (n * 4, 100 + NEW)


def test_sampling_draws_the_same_with_and_without_cache(hf: RwkvxForCausalLM) -> None:
    batch = padded(prompts(lengths=[30, 9]), "left")
    drawn = []
    for options in ({}, {"use_cache": False}, {"num_return_sequences": 3}):
        torch.manual_seed(3)
        sample = {"do_sample": True, "top_k": 20, "top_p": 0.95, "temperature": 0.8}
        drawn.append(hf.generate(**batch, **sample, **KEEP_GOING, **options))
    assert torch.equal(drawn[0], drawn[1])
    assert drawn[2].shape == (6, 30 + NEW)
    assert len({tuple(row.tolist()) for row in drawn[2]}) == 6


@pytest.mark.parametrize("sample", [False, True])
def test_beams_are_worth_their_score(hf: RwkvxForCausalLM, sample: bool) -> None:
    """The score of a beam is the log-probability of its tokens in one call: no state was mixed up.

    Without sampling, four beams find something at least as good as one.
    """
    batch = padded(prompts(lengths=[30, 9]), "left")
    torch.manual_seed(1)
    sums = {}
    for beams in (4, 1 + sample):
        out = hf.generate(
            **batch, num_beams=beams, do_sample=sample, length_penalty=0.0, top_k=0,
            return_dict_in_generate=True, output_scores=True, max_new_tokens=NEW, eos_token_id=None,
        )  # fmt: skip
        mask = torch.cat([batch["attention_mask"], torch.ones(2, NEW, dtype=torch.int64)], dim=1)
        with torch.no_grad():
            logits = hf(out.sequences, attention_mask=mask).logits[:, -NEW - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(2, out.sequences[:, -NEW:, None]).sum((1, 2))
        sums[beams] = logprobs
        if beams > 1:
            torch.testing.assert_close(
                out.sequences_scores.double(), logprobs, rtol=1e-4, atol=1e-3
            )
    assert sample or bool((sums[4] >= sums[1] - 1e-6).all())


def test_dictionary_outputs(hf: RwkvxForCausalLM) -> None:
    out = hf.generate(
        prompts(lengths=[40])[0], return_dict_in_generate=True, output_scores=True,
        output_logits=True, output_hidden_states=True, **KEEP_GOING,
    )  # fmt: skip
    assert len(out.scores) == len(out.logits) == len(out.hidden_states) == NEW
    assert [len(step) for step in out.hidden_states] == [5] * NEW
    assert out.hidden_states[0][0].shape == (1, 40, 32)
    assert out.hidden_states[1][0].shape == (1, 1, 32)
    assert isinstance(out.past_key_values, StateCache)
    assert out.past_key_values.get_seq_length() == 40 + NEW - 1


@pytest.mark.parametrize("beams", [1, 3])
def test_from_embeddings(hf: RwkvxForCausalLM, beams: int) -> None:
    ids = torch.cat(prompts(lengths=[40, 40]))
    options = {"do_sample": False, "num_beams": beams, **KEEP_GOING}
    out = hf.generate(inputs_embeds=hf.get_input_embeddings()(ids), **options)
    assert torch.equal(out, hf.generate(ids, **options)[:, 40:])


def test_without_a_prompt(hf: RwkvxForCausalLM) -> None:
    out = hf.generate(max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert torch.equal(out, greedy(hf, torch.tensor([[0]]), 5))  # from the start of a document


def test_going_on_from_a_cache(hf: RwkvxForCausalLM) -> None:
    """With all tokens or the new ones only, padded; a copy of the cache serves again."""
    batch = padded(prompts(lengths=[30, 9]), "left")
    options = {"do_sample": False, "return_dict_in_generate": True, "eos_token_id": None}
    whole = hf.generate(**batch, max_new_tokens=2 * NEW, **options).sequences
    first = hf.generate(**batch, max_new_tokens=NEW, **options)
    mask = torch.cat([batch["attention_mask"], torch.ones(2, NEW, dtype=torch.int64)], dim=1)
    for ids in (first.sequences, first.sequences[:, -1:]):
        cache = copy.copy(first.past_key_values)
        rest = hf.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW, **options
        )
        assert torch.equal(rest.sequences[:, -NEW:], whole[:, -NEW:])
        assert cache.get_seq_length() == 30 + 2 * NEW - 1


def test_logits_to_keep_changes_nothing(hf: RwkvxForCausalLM) -> None:
    ids = prompts(lengths=[40])[0]
    for options in ({}, {"num_beams": 2}, {"do_sample": True}):
        found = []
        for keep in (0, 1, 3):
            torch.manual_seed(0)
            found.append(hf.generate(ids, logits_to_keep=keep, **options, **KEEP_GOING))
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


def test_it_stops_at_the_end_of_a_document(hf: RwkvxForCausalLM) -> None:
    """One row ends and is padded, its neighbour goes on as if alone."""
    batch = padded(prompts(lengths=[30, 9]), "left")
    options = {"do_sample": False, "max_new_tokens": NEW, "suppress_tokens": [0]}
    free = hf.generate(**batch, eos_token_id=None, **options)[:, 30:].tolist()
    end = next(x for x in free[0][3:] if x not in free[1])
    place = free[0].index(end)
    out = hf.generate(**batch, eos_token_id=end, **options)[:, 30:].tolist()
    assert out[0] == [*free[0][: place + 1], *[0] * (NEW - 1 - place)]
    assert out[1] == free[1]


def test_what_is_refused(hf: RwkvxForCausalLM, caplog: pytest.LogCaptureFixture) -> None:
    ids = prompts(lengths=[40])[0]
    with pytest.raises(ValueError, match="stateful"):
        hf.generate(ids, prompt_lookup_num_tokens=3, max_new_tokens=3)
    with pytest.raises(ValueError, match="attention matrices are never formed"):
        hf.generate(ids, output_attentions=True, return_dict_in_generate=True, max_new_tokens=3)
    free = hf.generate(ids, do_sample=False, max_new_tokens=3)
    with caplog.at_level("WARNING"):
        out = hf.generate(ids, cache_implementation="static", do_sample=False, max_new_tokens=3)
    assert torch.equal(out, free)


def test_position_ids_and_masks_of_ones_change_nothing(hf: RwkvxForCausalLM) -> None:
    ids = prompts(lengths=[40])[0]
    plain = hf.generate(ids, do_sample=False, **KEEP_GOING)
    mask, positions = torch.ones_like(ids), torch.arange(40)[None]
    for extra in ({"attention_mask": mask}, {"position_ids": positions}):
        assert torch.equal(hf.generate(ids, do_sample=False, **extra, **KEEP_GOING), plain)


def test_pipeline(hf: RwkvxForCausalLM) -> None:
    """Text in, text out, in batches that the pipeline pads."""
    narrow = adapter(torch.float32)
    tokenizer = ByteTokenizer()
    write = pipeline("text-generation", model=narrow, tokenizer=tokenizer)
    texts = ["The grass", "a", "Here we go. There and back again, and then somewhere else"]
    options = {"do_sample": False, "max_new_tokens": 8, "return_full_text": False}
    together = write(texts, batch_size=3, **options)
    assert isinstance(hf, GenerationMixin)
    for text, out in zip(texts, together, strict=True):
        assert out[0]["generated_text"] == write(text, **options)[0]["generated_text"]
