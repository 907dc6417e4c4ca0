"""WKV7 in chunks, in plain torch: the fast form where gradients are wanted.

Axes: B batch, of states: sequences; T time, H heads, K key channels, V value channels, M chunks
(all first chunks of all sequences, then all second chunks, ...), C tokens of a chunk. README.md
derives the equations; differentiable by autograd.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkvx_kernels.wkv7.torch_scan import scan_chunks

# Tokens of a chunk: fastest, forward and backward together.
CHUNK = 64
# Longer inputs are worked through in segments of about so many tokens, which stay in the cache.
SEGMENT_TOKENS = 1024
# exp(+-MAX_EXPONENT) and products of two of them are finite in float32. A decay of exp(-40) leaves
# nothing of the state that float32 could show beside a new value, so clamping there is exact.
MAX_EXPONENT = 40.0


def wkv7_torch(
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    beta: Tensor,
    state_BHVK: Tensor,
    *,
    lengths: list[int],
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over sequences of `lengths` tokens laid one after the other in [B, T].

    Args:
        r, log_decay, k, alpha, beta: [B, T, H, K]; v: [B, T, H, V]; all of the state's dtype.
        state_BHVK: one state per sequence. A batch is a list of sequences of equal length.
        lengths: tokens of each sequence, summing to B·T.

    Returns:
        y [B, T, H, V] and the final states [B, H, V, K].
    """
    longest = max(lengths, default=0)
    if longest == 0:
        return torch.zeros_like(v), state_BHVK
    chunk = _chunk_size(log_decay, longest)
    layout = _Layout(lengths, chunk, v.device)
    log_decay = log_decay.clamp(min=-MAX_EXPONENT)
    chunks = [layout.to_chunks(x) for x in (r, log_decay, k, v, alpha, beta)]
    state = state_BHVK if layout.order is None else state_BHVK[layout.order]
    y_MHCV, state = scan_chunks(*[*chunks, state], segments=layout.segments())
    if layout.order is not None:
        state = state[torch.argsort(layout.order)]
    return layout.from_chunks(y_MHCV, v.shape), state


def _chunk_size(log_decay: Tensor, longest: int) -> int:
    """The largest power of two whose centred exponents stay within `MAX_EXPONENT`."""
    steepest = max(1e-6, -float(log_decay.detach().amin()))
    chunk = CHUNK
    while chunk > 1 and (chunk / 2 * steepest > MAX_EXPONENT or chunk >= 2 * longest):
        chunk //= 2
    return chunk


class _Layout:
    """Where the tokens of each sequence stand among chunks of equal size.

    Chunks are in the order of their number within their sequence, and within one number by falling
    sequence length, so that a scan step is one slice: the first `counts[step]` sequences.
    Missing tokens at the end of a sequence are zeros, which leave the state as it is.
    """

    def __init__(self, lengths: list[int], chunk: int, device: torch.device) -> None:
        self.chunk, self.lengths = chunk, lengths
        self.order: Tensor | None = None
        per_sequence = [-(-n // chunk) for n in lengths]
        self.counts = [sum(n > step for n in per_sequence) for step in range(max(per_sequence))]
        if min(lengths) == max(lengths):
            return
        length = torch.tensor(lengths, device=device)
        self.order = torch.argsort(length, descending=True, stable=True)
        start = (torch.cumsum(length, 0) - length)[self.order]
        within = torch.arange(chunk, device=device)
        rows = []
        for step, count in enumerate(self.counts):
            position = step * chunk + within
            row = start[:count, None] + position
            rows.append(row.masked_fill(position >= length[self.order[:count], None], -1))
        self.rows = torch.cat(rows).flatten()  # [M·C], -1 for a missing token

    def to_chunks(self, x_BTHK: Tensor) -> Tensor:
        """[B, T, H, K] -> [M, H, C, K], contiguous."""
        heads, width = x_BTHK.shape[2:]
        if self.order is None:
            batch, tokens = len(self.lengths), self.lengths[0]
            x = x_BTHK.reshape(batch, tokens, heads, width)
            missing = len(self.counts) * self.chunk - tokens
            if missing:
                x = F.pad(x, (0, 0, 0, 0, 0, missing))
            x = x.view(batch, len(self.counts), self.chunk, heads, width).permute(1, 0, 3, 2, 4)
            return x.reshape(-1, heads, self.chunk, width)
        rows = self.rows.clamp(min=0)
        x = x_BTHK.reshape(-1, heads, width)[rows].masked_fill((self.rows < 0)[:, None, None], 0)
        return x.view(-1, self.chunk, heads, width).transpose(1, 2).contiguous()

    def from_chunks(self, y_MHCV: Tensor, shape: torch.Size) -> Tensor:
        """[M, H, C, V] -> [B, T, H, V]."""
        heads, width = shape[2:]
        if self.order is None:
            steps, tokens = len(self.counts), self.lengths[0]
            y = y_MHCV.view(steps, len(self.lengths), heads, self.chunk, width)
            y = y.permute(1, 0, 3, 2, 4).reshape(-1, steps * self.chunk, heads, width)
            return y[:, :tokens].reshape(shape)
        valid = torch.nonzero(self.rows >= 0).squeeze(1)
        source = torch.empty(len(valid), dtype=torch.int64, device=y_MHCV.device)
        source[self.rows[valid]] = valid
        return y_MHCV.transpose(1, 2).reshape(-1, heads, width)[source].view(shape)

    def segments(self) -> list[list[int]]:
        """Consecutive scan steps, in groups of about `SEGMENT_TOKENS` tokens."""
        groups: list[list[int]] = [[]]
        for count in self.counts:
            if groups[-1] and (sum(groups[-1]) + count) * self.chunk > SEGMENT_TOKENS:
                groups.append([])
            groups[-1].append(count)
        return groups
