"""One long sequence over several processes: each reads a part of its tokens, in order.

What blocks need of other parts is sent through here, differentiably: gradients go the way back.
Every process must make the same calls in the same order.
Axes: B batch, T time of the own part, H heads, K key channels, V value channels, N processes.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rwkvx_kernels.wkv7 import wkv7_compose

__all__ = ["SequenceParallel"]


class _Exchange(torch.autograd.Function):
    """Rows to every process and from every process; gradients return."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.way = sent, received, group
        return _send(x, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        sent, received, group = ctx.way
        return _send(gradients[0], received, sent, group), None, None, None


def _send(x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """As bytes, since gloo does not know every dtype."""
    shape = (sum(received), *x.shape[1:])
    width = x.shape[1:].numel() * x.element_size()
    rows = x.contiguous().view(torch.uint8).reshape(len(x), width)
    found = torch.empty(shape[0], width, dtype=torch.uint8, device=x.device)
    dist.all_to_all_single(found, rows, received, sent, group=group)
    return found.view(x.dtype).view(shape)


class SequenceParallel:
    """The processes that share one sequence.

    Attributes:
        rank, size: this process's place among them, which is that of its tokens.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def own(self, x: Tensor) -> Tensor:
        """This process's part of a whole batch [B, N·T, ...]."""
        return x.chunk(self.size, dim=1)[self.rank]

    def gathered(self, x: Tensor, dim: int) -> Tensor:
        """The parts of all processes, one after the other along a dimension; no gradient."""
        x = x.detach().movedim(dim, 0).contiguous()
        counts = [len(x)] * self.size
        parts = _send(torch.cat([x] * self.size), counts, counts, self.group)
        return parts.movedim(0, dim)

    def last(self, x: Tensor) -> Tensor:
        """What the process with the end of the sequence has; no gradient."""
        found = x.detach().clone()
        dist.broadcast(found, group=self.group, group_src=self.size - 1)
        return found

    @torch.compiler.disable
    def shifted(self, x: Tensor, distance: int) -> Tensor:
        """What the process so many places before has; zeros where there is none."""
        sent, received = [0] * self.size, [0] * self.size
        if self.rank + distance < self.size:
            sent[self.rank + distance] = 1
        if self.rank >= distance:
            received[self.rank - distance] = 1
        rows = x.unsqueeze(0)[: sum(sent)]
        # A sum over one row or none: every process has the same graph, and so the same way back.
        return _Exchange.apply(rows, sent, received, self.group).sum(0)

    def before(self, last: Tensor, first: Tensor) -> Tensor:
        """What the process before has at its end; `first` at the start of the sequence."""
        return self.shifted(last, 1) + first * float(self.rank == 0)

    def state_before(self, p: Tensor, d: Tensor, initial: Tensor) -> Tensor:
        """The WKV7 state [B, H, V, K] that this part starts from.

        p [B, H, K, K], d [B, H, V, K]: of this part (`wkv7_summary`); initial: of the sequence.
        Summaries are composed by doubling distances (Hillis and Steele, 1986): log2 N rounds.
        """
        keys, distance = p.shape[-1], 1
        identity = torch.eye(keys, dtype=p.dtype, device=p.device)

        def earlier(p: Tensor, d: Tensor, distance: int) -> tuple[Tensor, Tensor]:
            both = self.shifted(torch.cat([p, d], dim=-2), distance)
            none = float(self.rank < distance)
            return both[..., :keys, :] + none * identity, both[..., keys:, :]

        while distance < self.size:
            p, d = wkv7_compose(earlier(p, d, distance), (p, d))
            distance *= 2
        p, d = earlier(p, d, 1)
        return initial @ p + d

    @torch.compiler.disable
    def fetched(self, rows: Tensor, wanted: Tensor, owners: Tensor) -> Tensor:
        """Rows of other processes: `rows` are what this one has, `wanted` [n] numbers of rows of
        the processes `owners` [n], which must not fall. Returns [n, ...]."""
        counts = torch.bincount(owners, minlength=self.size)
        one = [1] * self.size
        asked = _send(counts.unsqueeze(1), one, one, self.group).flatten()
        mine, theirs = counts.tolist(), asked.tolist()
        numbers = _send(wanted.unsqueeze(1), mine, theirs, self.group).flatten()
        found: Tensor = _Exchange.apply(rows[numbers], theirs, mine, self.group)
        return found

    def joined_before(self, x: Tensor, tokens: int) -> Tensor:
        """[B, T, ...] with those of the `tokens` tokens before it that there are, and maybe more
        of them: [B, S, ...]."""
        length = x.shape[1]
        count = min(self.size - 1, -(-tokens // length))
        parts: Sequence[Tensor] = [self.shifted(x, i) for i in range(count, 0, -1)]
        missing = count - min(count, self.rank)
        return torch.cat([*parts, x], dim=1)[:, missing * length :]
