"""A batch through the model, and its loss.

Axes: B batch, T time, C width.
"""

from torch import Tensor

from rwkvx.model import Model
from rwkvx.state import ModelState
from rwkvx.training.batches import Batch
from rwkvx_kernels.linear import linear_cross_entropy


def hidden_states(
    model: Model, batch: Batch, state: ModelState | None
) -> tuple[Tensor, ModelState]:
    """[B, T, C] that the head reads; documents inside of rows are read as packed sequences."""
    offsets = batch.offsets
    ids = batch.inputs if offsets is None else batch.inputs.reshape(1, -1)
    hidden, final = model(ids, state, logits="hidden", cu_seqlens=offsets, keep_cache=False)
    return hidden.view(*batch.inputs.shape, -1), final


def weighted_loss(model: Model, hidden_BTC: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of all targets, each times its weight, summed: a scalar in float32."""
    flat = (hidden_BTC.flatten(0, 1), model.head.weight, batch.targets.flatten())
    return linear_cross_entropy(*flat, batch.weights.flatten())
