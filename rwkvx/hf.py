"""The model behind Hugging Face's interface: configuration and causal language model.

Importing this module registers it with transformers' Auto classes; `import rwkvx` sees to that.
Axes: B batch, T time, C width, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from rwkvx.checkpoint import hub
from rwkvx.checkpoint.checkpoint import check_finite
from rwkvx.checkpoint.folder import CONFIG
from rwkvx.checkpoint.manifest import write_manifest
from rwkvx.config import ModelConfig, field_names, hybrid_pattern
from rwkvx.errors import InputError
from rwkvx.hf_cache import StateCache, one_cache
from rwkvx.init import init_weights
from rwkvx.model import Model
from rwkvx.packing import Packing
from rwkvx.tokenizers import TOKENIZERS, ByteTokenizer, WorldTokenizer

__all__ = ["ByteTokenizer", "RwkvxConfig", "RwkvxForCausalLM", "StateCache", "WorldTokenizer"]

# transformers 5.24 renamed `past_key_values`; before it, only the old name is known.
_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
_DEFAULT = ModelConfig(vocab_size=65536, width=768, pattern=hybrid_pattern(12, 4))


class RwkvxConfig(PreTrainedConfig):
    """The fields of `rwkvx.ModelConfig` (defaults: the 0.22B shape), and Hugging Face's own."""

    model_type = hub.MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (Hugging Face's)
    attribute_map = {"hidden_size": "width"}  # noqa: RUF012

    def __init__(self, **kwargs: Any) -> None:
        own = {name: kwargs.pop(name) for name in field_names() if name in kwargs}
        use_cache = kwargs.pop("use_cache", True)
        common = {name: x for name, x in hub.CONFIG_KEYS.items() if name != "model_type"}
        super().__init__(**{**common, "tie_word_embeddings": False, **kwargs})
        self.use_cache = use_cache
        for name, value in ModelConfig.from_dict({**_DEFAULT.to_dict(), **own}).to_dict().items():
            setattr(self, name, value)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing: a saved folder imports this package, no code is copied into it."""

    def model_config(self) -> ModelConfig:
        """What `rwkvx.Model` is built from."""
        found = {name: getattr(self, name) for name in field_names() if hasattr(self, name)}
        return ModelConfig.from_dict(found)

    @property
    def num_hidden_layers(self) -> int:
        """Blocks."""
        return len(self.pattern)

    @property
    def num_attention_heads(self) -> int:
        """Query heads."""
        return int(self.width // self.head_size)

    @property
    def tokenizer_class(self) -> str | None:
        """For `AutoTokenizer`, in folders without tokenizer_config.json."""
        return hub.TOKENIZER_CLASSES.get(self.tokenizer)


class RwkvxForCausalLM(PreTrainedModel, GenerationMixin):
    """`rwkvx.Model` as a Hugging Face causal language model; it adds no parameter of its own.

    Rows with padding, on either side, are read as packed sequences: padding changes nothing.
    """

    config_class = RwkvxConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _is_stateful = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    def __init__(self, config: RwkvxConfig) -> None:
        super().__init__(config)
        self.gradient_checkpointing = False
        # Not a child: its children are ours, so that parameters have the names that files have,
        # for everything that loads a file by itself.
        self.__dict__["model"] = Model(config.model_config())
        for name, child in self.model.named_children():
            setattr(self, name, child)
        self.post_init()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self._modules and "model" in vars(self):
            setattr(self.model, name, value)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As everywhere in transformers; every weight is finite in the dtype asked for."""
        loaded = super().from_pretrained(*args, **kwargs)
        check_finite((loaded[0] if isinstance(loaded, tuple) else loaded).state_dict())
        return loaded

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: StateCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cache: StateCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Read tokens; arguments as everywhere in transformers.

        Args:
            input_ids: [B, T]; or inputs_embeds [B, T, C].
            attention_mask: [B, past + T], 0 for padding, wherever it stands. Logits there are 0.
            position_ids: [1, T], without a mask: where they do not go on by one, a new sequence
                starts (padding-free batches). Otherwise unused: the model counts by itself.
            past_key_values, cache: what an earlier call returned, changed in place; two names of
                one thing (transformers 5.24 renamed it).
            labels: [B, T], -100 for none; they are shifted here.
            use_cache: return the cache; default: the config's, never in training.
            logits_to_keep: logits of so many last positions only, or of these positions; 0: all.
            cu_seq_lens_q: [sequences + 1] offsets of packed sequences, in place of position_ids.

        Raises:
            InputError: arguments that do not fit together; attention matrices, which are not made.
        """
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if inputs is None or (input_ids is not None and inputs_embeds is not None):
            raise InputError("give either input_ids or inputs_embeds")
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise InputError("attention matrices are never formed: output_attentions is not there")
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        every = self.config.output_hidden_states
        every = bool(every if output_hidden_states is None else output_hidden_states)
        past = one_cache(past_key_values, cache)
        positions = None if past.seen else position_ids
        packing = Packing.of(inputs, attention_mask, positions, cu_seq_lens_q)
        if use_cache and labels is None and not every:
            logits = self._step(input_ids, packing, past)
            if logits is not None:
                return CausalLMOutputWithPast(logits=logits, **cast(Any, {_CACHE: past}))
        self.model.gradient_checkpointing = self.gradient_checkpointing
        layers = self._read(inputs, packing, past, use_cache, every)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, loss = self.model.head(layers[-1][:, kept]), None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=logits.shape[-1], **kwargs)
        states = tuple(layers) if every else None
        return _output(loss, logits, states, past if use_cache else None, layers[-1])

    def _step(self, ids: Tensor | None, packing: Packing, past: StateCache) -> Tensor | None:
        """Logits [B, 1, V] after one more token in each row by a decoder; None for other calls."""
        if ids is None or ids.shape[1] != 1 or not past.seen or torch.is_grad_enabled():
            return None
        return past.step(self.model, ids) if packing.is_plain else None

    def _read(
        self, inputs: Tensor, packing: Packing, past: StateCache, keep: bool, every: bool
    ) -> list[Tensor]:
        """Hidden states [B, T, C]: the input of `every` block, and what the head reads."""
        parts = []
        for part, packed in packing.segments(inputs, self.model, keep):
            with _block_inputs(self.model, every, packed, *part.shape[:2]) as layers:
                hidden, past.state = self.model(
                    packed.pack(part),
                    past.state,
                    logits="hidden",
                    cu_seqlens=packed.cu_seqlens,
                    keep_cache=keep,
                )
            parts.append([*layers(), packed.unpack(hidden, *part.shape[:2])])
        past.seen += inputs.shape[1]
        return [x[0] if len(x) == 1 else torch.cat(x, dim=1) for x in zip(*parts, strict=True)]

    def get_input_embeddings(self) -> nn.Module:
        return self.emb

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.emb = value
        self.model.config = replace(self.model.config, vocab_size=value.num_embeddings)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.head = new_embeddings

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """RWKV-7's initial values, once, for every parameter that came from no checkpoint."""
        missing: dict[str, Tensor] = {}
        for path, module in self.named_modules():
            own = {f"{path}.{n}": x for n, x in module.named_parameters(recurse=False)}
            if not getattr(module, "_is_hf_initialized", False):
                missing |= {n: x for n, x in own.items() if not hasattr(x, "_is_hf_initialized")}
            for known in (module, *own.values()):
                known._is_hf_initialized = True
        if missing:
            seed = int(torch.randint(1 << 31, ()))
            with torch.device("cpu"):
                fresh = init_weights(Model(self.model.config), seed).state_dict()
            for name, x in missing.items():
                x.copy_(fresh[name])

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a folder that `rwkvx.load` and the Auto classes read."""
        tensors = self.state_dict() if state_dict is None else state_dict
        if getattr(self, "_hf_peft_config_loaded", False):  # then only adapters are written
            return super().save_pretrained(save_directory, is_main_process, tensors, **kwargs)
        folder = Path(save_directory)
        if is_main_process:  # first: the base class may upload the folder
            code = hub.write_hub_files(folder, self.config.tokenizer)
        super().save_pretrained(save_directory, is_main_process, tensors, **kwargs)
        if is_main_process:
            weights = [path.name for path in folder.glob("*.safetensors*")]
            write_manifest(folder, [CONFIG, code, *weights])

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Nothing: a saved folder imports this package, no code is copied into it."""

    def _maybe_initialize_input_ids_for_generation(
        self, inputs: Tensor | None, bos_token_id: Any, model_kwargs: dict[str, Any]
    ) -> Tensor:
        # A prompt without tokens begins a document, as no prompt does.
        if inputs is None or inputs.shape[1]:
            return super()._maybe_initialize_input_ids_for_generation(
                inputs, bos_token_id, model_kwargs
            )
        ones = torch.ones(len(inputs), 1, dtype=torch.int64, device=inputs.device)
        model_kwargs["attention_mask"] = ones
        return ones * int(bos_token_id or 0)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        # The base class gives no cache to a class named like this one, only warnings where due.
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if not generation_config.use_cache:
            return
        if model_kwargs.get(_CACHE) is None:
            model_kwargs[_CACHE] = StateCache()
        cache, longest = model_kwargs[_CACHE], generation_config.max_length
        if isinstance(cache, StateCache) and longest:
            cache.room = max(0, longest - cache.seen)


def _output(
    loss: Tensor | None,
    logits: Tensor,
    states: tuple[Tensor, ...] | None,
    past: StateCache | None,
    last: Tensor,
) -> CausalLMOutputWithPast:
    kept: dict[str, Any] = {_CACHE: past}
    output: Any = CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=states, **kept)
    # No field, since a tuple of the output has none: TRL reads it of what it takes for a backbone.
    output.last_hidden_state = last
    return cast(CausalLMOutputWithPast, output)


@contextmanager
def _block_inputs(
    model: Model, wanted: bool, packed: Packing, rows: int, width: int
) -> Iterator[Any]:
    """Collects the input of every block of a call: afterwards, a list of [B, T, C].

    They lie on the path to the logits: a block reads what is collected.
    """
    parts: list[list[Tensor]] = [[] for _ in model.blocks] if wanted else []

    def collect(part: list[Tensor], x: Tensor) -> Tensor:
        part.append(packed.unpack(x, rows, width))
        return packed.pack(part[-1])

    handles = [
        block.register_forward_pre_hook(lambda _, a, part=part: (collect(part, a[0]), *a[1:]))
        for block, part in zip(model.blocks, parts, strict=False)
    ]
    try:
        yield lambda: [x[0] if len(x) == 1 else torch.cat(x, dim=1) for x in parts]
    finally:
        for handle in handles:
            handle.remove()


AutoConfig.register(hub.MODEL_TYPE, RwkvxConfig, exist_ok=True)
AutoModelForCausalLM.register(RwkvxConfig, RwkvxForCausalLM, exist_ok=True)
for _tokenizer in TOKENIZERS.values():  # the last one for a config that names none
    AutoTokenizer.register(RwkvxConfig, cast(Any, _tokenizer), exist_ok=True)
