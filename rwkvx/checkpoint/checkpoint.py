"""What every format is read into and written from: a config and tensors by our parameter names."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkvx.config import TOKENIZER_FILE, TOKENIZERS, ModelConfig
from rwkvx.errors import InputError
from rwkvx.model import Model


class Checkpoint(NamedTuple):
    """A whole model as data; the names are those of `Model(config).state_dict()`.

    tokenizer: Hugging Face's, where the config says "file".
    """

    config: ModelConfig
    tensors: dict[str, Tensor]
    tokenizer: Any = None

    @classmethod
    def of(cls, model: Model) -> "Checkpoint":
        """The weights of a model, not copied.

        Raises:
            InputError: they are quantised.
        """
        for name, x in model.named_parameters():
            if x.dtype == torch.int8:
                raise InputError(
                    f"{name} is int8: save the model that was loaded, in its own dtype"
                )
        tensors = {n: x.detach() for n, x in model.state_dict().items()}
        return cls(model.config, tensors, model.tokenizer_of_file)

    def model(self) -> Model:
        """A model in evaluation mode on these very tensors, whatever their dtypes."""
        with torch.device("meta"):
            model = Model(self.config)
        model.load_state_dict(self.tensors, assign=True)
        model.use_tokenizer(self.tokenizer)
        return model.eval()

    def to(self, dtype: torch.dtype) -> "Checkpoint":
        """The same in another dtype."""
        return self._replace(tensors={n: x.to(dtype) for n, x in self.tensors.items()})


def parameter_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Shape by our name of every parameter, in the order of the model."""
    with torch.device("meta"):
        return {name: x.shape for name, x in Model(config).state_dict().items()}


def merge_config(found: Mapping[str, Any], overrides: Mapping[str, Any]) -> ModelConfig:
    """The config that a file tells of, with what the caller asked for on top."""
    return ModelConfig.from_dict({**found, **overrides})


def check_finite(checkpoint: Checkpoint, origin: str) -> None:
    """Refuse a tensor with NaN or infinity, by name; reads everything once, copies nothing.

    Raises:
        InputError: there is one.
    """
    for name, x in checkpoint.tensors.items():
        if x.numel() and x.is_floating_point():
            # Both carry NaN on. isfinite() would hold whole tensors of its own.
            low, high = torch.aminmax(x)
            if not (low.isfinite() and high.isfinite()):
                raise InputError(f"{origin}: {name} holds NaN or infinite values")


def check_vocabulary(config: ModelConfig, origin: str, tokenizer: Any = None) -> None:
    """Refuse an embedding with fewer rows than the tokenizer has ids.

    tokenizer: the one that "file" stands for, if it is at hand.

    Raises:
        InputError: it has.
    """
    if config.tokenizer == TOKENIZER_FILE:
        from rwkvx.tokenizers.file import count_ids

        ids = count_ids(tokenizer) if tokenizer is not None else 0
    else:
        ids = 0 if config.tokenizer is None else TOKENIZERS[config.tokenizer]
    if config.vocab_size < ids:
        raise InputError(
            f"{origin}: emb.weight has {config.vocab_size} rows, but the tokenizer "
            f"{config.tokenizer!r} has {ids} ids: name another tokenizer, or none"
        )
