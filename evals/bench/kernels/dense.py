"""Dense causal attention by others: torch's backends one by one, and flash-attn if installed.

Axes: B batch, T time, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rwkvx_evals.bench.machine import installed

# A name of torch's own starts so.
SDPA = "dense SDPA"
BACKENDS = {
    f"{SDPA} cuDNN": SDPBackend.CUDNN_ATTENTION,
    f"{SDPA} flash": SDPBackend.FLASH_ATTENTION,
}
FLASH = "flash-attn"


@dataclass(frozen=True)
class Dense:
    """Attention of each query to all keys up to its own.

    Attributes:
        attend: of q, k, v laid out as `lay_out` does, which undoes itself; the result likewise.
    """

    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    lay_out: Callable[[Tensor], Tensor]


def implementations() -> dict[str, Dense]:
    """By name; what does not work on a machine says so when it is called."""
    found = {name: Dense(partial(_sdpa, x), _heads_first) for name, x in BACKENDS.items()}
    if installed(FLASH):
        found[FLASH] = Dense(_flash, torch.clone)
    return found


def _heads_first(x: Tensor) -> Tensor:
    """[B, T, H, D] -> [B, H, T, D], and back."""
    return x.transpose(1, 2).contiguous()


def _sdpa(backend: SDPBackend, q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=True)


def _flash(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    o_BTHD: Tensor = flash_attn_func(q_BTHD, k_BTHD, v_BTHD, causal=True)
    return o_BTHD
