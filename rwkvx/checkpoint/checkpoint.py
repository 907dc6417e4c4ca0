"""What every format is read into and written from: a config and tensors by our parameter names."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkvx import memory
from rwkvx.config import TOKENIZERS, ModelConfig
from rwkvx.dtypes import wider
from rwkvx.errors import InputError
from rwkvx.model import Model


class Checkpoint(NamedTuple):
    """A whole model as data; the names are those of `Model(config).state_dict()`.

    tokenizer: Hugging Face's, where it is more than what the config names.
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
        return cls(model.config, tensors, model.tokenizer_to_save)

    def model(self) -> Model:
        """A model in evaluation mode on these very tensors, whatever their dtypes."""
        with torch.device("meta"):
            model = Model(self.config)
        model.load_state_dict(self.tensors, assign=True)
        model.use_tokenizer(self.tokenizer)
        return model.eval()

    def to(self, dtype: torch.dtype, origin: str = "the model") -> "Checkpoint":
        """The same in another dtype.

        Raises:
            InputError: a number is too large for it.
        """
        tensors = {n: cast(x, dtype, f"{origin}: {n}") for n, x in self.tensors.items()}
        return self._replace(tensors=tensors)


def parameter_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Shape by our name of every parameter, in the order of the model."""
    with torch.device("meta"):
        return {name: x.shape for name, x in Model(config).state_dict().items()}


def merge_config(found: Mapping[str, Any], overrides: Mapping[str, Any]) -> ModelConfig:
    """The config that a file tells of, with what the caller asked for on top."""
    return ModelConfig.from_dict({**found, **overrides})


def cast(x: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """`x` in another dtype, every number of it finite; `what` names it in an error.

    Raises:
        InputError: NaN or infinities, from the start or because `dtype` is too narrow.
    """
    y = x.to(dtype)
    if is_finite(y):
        return y
    if not is_finite(x):
        raise InputError(f"{what} holds NaN or infinite values")
    name = str(dtype).removeprefix("torch.")
    raise InputError(f"{what} overflows in {name}: try dtype {wider(dtype)}")


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights that a loader which is not ours has read or cast into NaN or infinities.

    Raises:
        InputError: names the first one, and the dtype to try.
    """
    for name, x in tensors.items():
        if not x.is_meta and not is_finite(x):
            dtype = str(x.dtype).removeprefix("torch.")
            raise InputError(
                f"{name} holds NaN or infinite values in {dtype}: try dtype {wider(dtype)}, and "
                "check the file if that has them too"
            )


def is_finite(x: Tensor) -> bool:
    """Whether a tensor is free of NaN and infinities; reads it once, copies nothing."""
    if not x.numel() or not x.is_floating_point():
        return True
    # Both carry NaN on. isfinite() would hold whole tensors of its own.
    low, high = torch.aminmax(x)
    return bool(low.isfinite() and high.isfinite())


def check_vocabulary(config: ModelConfig, origin: str, tokenizer: Any = None) -> None:
    """Refuse an embedding with fewer rows than the tokenizer has ids.

    tokenizer: the model's, if it is at hand; without it, what the config names is counted.

    Raises:
        InputError: it has.
    """
    if tokenizer is not None:
        from rwkvx.tokenizers.file import count_ids

        ids = count_ids(tokenizer)
    else:
        ids = TOKENIZERS.get(config.tokenizer or "", 0)
    if config.vocab_size < ids:
        raise InputError(
            f"{origin}: emb.weight has {config.vocab_size} rows, but the tokenizer "
            f"{config.tokenizer!r} has {ids} ids: name another tokenizer, or none"
        )


def check_room(checkpoint: Checkpoint, dtype: torch.dtype | None, origin: str) -> None:
    """Refuse weights that this machine has no memory to hold in another dtype.

    Raises:
        InputError: there are too many; those that stay mapped from the file are not counted.
    """
    tensors = checkpoint.tensors.values()
    needed = sum(x.numel() * dtype.itemsize for x in tensors if dtype and x.dtype != dtype)
    memory.check_room(needed, f"{origin} in {str(dtype).removeprefix('torch.')}")
