"""The Triton kernels of WKV7 as operators of torch, so that its compiler sees through them.

Importing this module registers `torch.ops.rwkvx.wkv7_*`. Each has a fake implementation, which
only says what comes out.
"""

import torch
from torch import Tensor

from rwkvx_kernels.wkv7.triton_step import step


@torch.library.custom_op("rwkvx::wkv7_step", mutates_args=())
def wkv7_step(
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    beta: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """WKV7 token by token: shapes as for `wkv7`, all contiguous, no gradient."""
    return step(r, log_decay, k, v, alpha, beta, state, cu_seqlens)


@wkv7_step.register_fake
def _(
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    beta: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(v), torch.empty_like(state)
