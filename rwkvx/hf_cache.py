"""`past_key_values` of Hugging Face's interface: the model's state, and a decoder that goes on."""

from typing import Any, Self

from torch import Tensor
from transformers import Cache

from rwkvx.decoding import Decoder, start
from rwkvx.errors import InputError
from rwkvx.model import Model
from rwkvx.state import ModelState, repeat_state, select_state


class StateCache(Cache):
    """`past_key_values`: the model's state after the tokens read so far.

    A call with it goes on from there and puts the new state in. States stay valid, so that
    `copy.copy(cache)` is a fork that costs nothing.
    """

    is_croppable = False
    # Per layer; where all are, `generate` reads the whole prompt again on top of a given cache.
    is_linear = (False,)

    def __init__(self, state: ModelState | None = None, seen: int = 0) -> None:
        """seen: columns of `input_ids` read so far, padding included, as `generate` counts."""
        super().__init__(layers=[])
        self._state, self.seen = state, seen
        self.room = 0  # tokens that are expected to follow one by one
        self._decoder: Decoder | None = None

    @property
    def state(self) -> ModelState | None:
        """After the tokens read so far; None before the first."""
        return self._state if self._decoder is None else self._decoder.state

    @state.setter
    def state(self, state: ModelState | None) -> None:
        self._state, self._decoder = state, None

    def step(self, model: Model, ids: Tensor) -> Tensor:
        """Read ids [B, 1] after a prompt, by a decoder that goes on from step to step."""
        if self._decoder is None or self._decoder.room == 0:
            self.state = self.state  # of a decoder without room
            self._decoder, self.room = start(model, self._state, self.room), 0
        self.seen += 1
        return self._decoder.step(ids)

    def __copy__(self) -> Self:
        return type(self)(self.state, self.seen)

    def __repr__(self) -> str:
        return f"StateCache(rows={self.batch_size}, seen={self.seen})"

    def __len__(self) -> int:
        return len(self._state.blocks) if self._state else 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of `input_ids` read so far."""
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is none."""
        return -1

    @property
    def batch_size(self) -> int:
        """Rows, -1 before the first call."""
        return self._state.rows if self._state else -1

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, in that order, repeats allowed."""
        self.state = select_state(self.state, indices) if self.state else None

    reorder_cache = batch_select_indices

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, neighbours together."""
        self.state = repeat_state(self.state, repeats) if self.state else None

    def reset(self) -> None:
        """Back to the start."""
        self.state, self.seen = None, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: a recurrent state cannot go back."""
        if tokens_to_remove:
            raise InputError("a recurrent state cannot be cropped: fork it with copy.copy before")


def one_cache(past_key_values: Any, cache: Any) -> StateCache:
    """What was given under either name, or a new one."""
    if cache is not None and past_key_values is not None:
        raise InputError("give either past_key_values or cache, two names of one thing")
    past = past_key_values if cache is None else cache
    if past is not None and not isinstance(past, StateCache):
        raise InputError(f"past_key_values must be a StateCache: {type(past)}")
    return StateCache() if past is None else past
