"""int8 weights: half of bfloat16's bytes, for decoding, which is bound by reading them.

Axes: I inputs, O outputs.
"""

import torch
from torch import nn

from rwkvx.layers import Linear
from rwkvx.model import Model


@torch.no_grad()
def quantize(model: Model) -> Model:
    """Round every projection and the head to int8, in place; what else there is stays as it is.

    Each row has a scale of its own, largest magnitude / 127: weight ≈ int8 · scale. Embedding,
    low-rank factors, vectors and norms are a small part of what a token reads.
    """
    for module in model.modules():
        if isinstance(module, Linear) and module.scale is None:
            scale_O1 = module.weight.float().abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / 127
            rounded_OI = (module.weight.float() / scale_O1).round_().to(torch.int8)
            module.weight = nn.Parameter(rounded_OI, requires_grad=False)
            module.scale = nn.Parameter(scale_O1.squeeze(1), requires_grad=False)
    return model
