"""Decoding by calling the model."""

from typing import Any

import torch
from torch import Tensor


class EagerDecoder:
    """See `rwkvx.decoding.Decoder`."""

    room = None

    def __init__(self, model: Any, state: Any) -> None:
        self.model, self.state = model, state

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        """See `Decoder.step`."""
        logits: Tensor
        logits, self.state = self.model(ids, self.state, logits="last")
        return logits
