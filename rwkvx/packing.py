"""Batches with padding as packed sequences, which padding cannot change.

Axes: B batch, T time, C width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkvx.errors import InputError
from rwkvx.model import Model


class Packing(NamedTuple):
    """How [B, T] inputs stand in packed sequences: which of the B·T are tokens (None: all, as they
    are), and the sequences' offsets (None: a plain batch)."""

    tokens: Tensor | None
    cu_seqlens: Tensor | None

    @property
    def is_plain(self) -> bool:
        """Whether it is a batch as it is."""
        return self.tokens is None and self.cu_seqlens is None

    @classmethod
    def of(
        cls,
        inputs: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cu_seqlens: Tensor | None = None,
    ) -> "Packing":
        """From offsets, from a mask with padding, or from positions that start anew."""
        if cu_seqlens is not None:
            return cls(None, cu_seqlens)
        rows, width = inputs.shape[:2]
        if attention_mask is not None:
            if attention_mask.dim() != 2 or attention_mask.shape[1] < width:
                raise InputError(
                    f"attention_mask must be [B, past + T] beside {width} tokens, got "
                    f"{list(attention_mask.shape)}"
                )
            if not width:
                return cls(None, None)
            real = attention_mask[:, -width:] != 0
            if not bool(real.any()):
                raise InputError("attention_mask leaves no token at all")
            return cls.of_mask(real)
        if position_ids is not None and rows == 1:
            starts = (position_ids.flatten().diff() != 1).nonzero().squeeze(1) + 1
            if len(starts):
                return cls(
                    None, torch.cat([starts.new_tensor([0]), starts, starts.new_tensor([width])])
                )
        return cls(None, None)

    @classmethod
    def of_mask(cls, real_BT: Tensor) -> "Packing":
        """From a mask with at least one token."""
        if bool(real_BT.all()):
            return cls(None, None)
        offsets = F.pad(real_BT.sum(dim=1).cumsum(0), (1, 0))
        return cls(real_BT.flatten().nonzero().squeeze(1), offsets)

    def segments(
        self, inputs: Tensor, model: Model, keep_cache: bool
    ) -> list[tuple[Tensor, "Packing"]]:
        """The inputs as one, or cut along T where a padded batch is read without gradients.

        Memory then goes with the segment, as it does for a batch without padding (which the model
        cuts by itself). Each part goes on from the caches of the one before: they must be kept.
        """
        rows, width = inputs.shape[:2]
        widths = model.segment_lengths(rows, width)
        if self.tokens is None or torch.is_grad_enabled() or not keep_cache or len(widths) == 1:
            return [(inputs, self)]
        real = torch.zeros(rows * width, dtype=torch.bool, device=inputs.device)
        real[self.tokens] = True
        masks = real.view(rows, width).split(widths, 1)
        if not all(bool(mask.any()) for mask in masks):  # a mask with a gap in all rows
            return [(inputs, self)]
        parts = zip(inputs.split(widths, 1), masks, strict=True)
        return [(part, Packing.of_mask(mask)) for part, mask in parts]

    def pack(self, inputs: Tensor) -> Tensor:
        """[B, T, ...] -> [1, tokens, ...], or as it is."""
        return inputs if self.tokens is None else inputs.flatten(0, 1)[self.tokens].unsqueeze(0)

    def unpack(self, x: Tensor, rows: int, width: int) -> Tensor:
        """[1, tokens, C] -> [B, T, C] with zeros at padding, or as it is."""
        if self.tokens is None:
            return x
        spread = x.new_zeros(rows * width, x.shape[-1]).index_copy(0, self.tokens, x[0])
        return spread.unflatten(0, (rows, width))
