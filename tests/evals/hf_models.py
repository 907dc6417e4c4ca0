"""Tiny random Hugging Face models with a small BPE tokenizer, saved to a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM
from transformers import PreTrainedTokenizerFast as Fast

from rwkvx.data.passkey import QUESTION, STANDARD_FILLER, TASK

CHAT = (
    "{{ bos_token }}{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def bpe_tokenizer(bos: bool = True, chat: bool = False) -> Fast:
    """Byte-level BPE of a few hundred tokens; `bos`: texts start with one of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TASK, STANDARD_FILLER, QUESTION] * 4, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
    fast = Fast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    if chat:
        fast.chat_template = CHAT
    return fast


def save_model(kind: str, folder: Path, **more: Any) -> Path:
    """A random Llama or Mamba whose answers depend on all that it read."""
    torch.manual_seed(7)
    words = bpe_tokenizer(**more)
    common = {"vocab_size": len(words), "hidden_size": 32, "num_hidden_layers": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.3}
    if kind == "llama":
        config: Any = LlamaConfig(
            **common, **ends, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1,
            max_position_embeddings=4096,
        )  # fmt: skip
        model: Any = LlamaForCausalLM(config)
    else:
        config = MambaConfig(**common, **ends, state_size=8, pad_token_id=1)
        model = MambaForCausalLM(config)
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.2 * torch.randn_like(weight)
    model.eval().save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
