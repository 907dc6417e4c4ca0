"""One optimiser step on random tokens, as the trainer makes it.

Axes: B batch, T time.
"""

from __future__ import annotations

import torch
from torch import nn

import rwkvx
from rwkvx.init import init_weights
from rwkvx.training.batches import Batch
from rwkvx.training.config import OptimizerConfig
from rwkvx.training.forward import Objective
from rwkvx.training.optim import build_optimizer


def random_batch(vocab_size: int, rows: int, length: int, device: str = "cpu") -> Batch:
    """[B, T] of tokens and what follows them, the same every time, all of one weight."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (rows, length + 1), generator=draw)
    weights = torch.full((rows, length), 1 / (rows * length))
    none = torch.zeros(rows, length, dtype=torch.bool)
    return Batch(ids[:, :-1].clone(), ids[:, 1:].clone(), weights, none, none.numpy()).to(device)


def fresh_model(config: rwkvx.ModelConfig, device: str = "cpu") -> rwkvx.Model:
    """Random weights in float32, in training mode."""
    return init_weights(rwkvx.Model(config), 0).to(device).train()


class Step:
    """Forward, backward, gradient norm, optimiser.

    Args:
        called: the objective, which processes may share; None: that of the model alone.
        half: products in bfloat16 (autocast).
    """

    def __init__(
        self, model: rwkvx.Model, batch: Batch, half: bool, called: nn.Module | None = None
    ) -> None:
        self.model, self.batch, self.half = model, batch, half
        self._called = Objective(model) if called is None else called
        self._optimizer = build_optimizer(model, OptimizerConfig())

    def __call__(self) -> None:
        self.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def backward(self) -> None:
        """Gradients alone."""
        kind = self.model.device.type
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=self.half):
            loss, _ = self._called(self.batch)
        loss.backward()
