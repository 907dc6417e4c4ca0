"""WKV7 token by token: the specification, in any float dtype, differentiable by autograd.

Axes: B batch, T time, H heads, K key channels, V value channels.
"""

import torch
from torch import Tensor


def wkv7_reference(
    r_BTHK: Tensor,
    log_decay_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    alpha_BTHK: Tensor,
    beta_BTHK: Tensor,
    state_BHVK: Tensor,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence of RWKV-7 (arXiv 2503.14456, eq. 14-17) one token after the other.

    All arguments have the dtype of the state; the result is (y [B, T, H, V], state [B, H, V, K]).
    """
    decay_BTHK = log_decay_BTHK.exp()
    outputs = []
    for t in range(r_BTHK.shape[1]):
        # u_t = S_{t-1} alpha_t
        u_BHV = torch.einsum("bhvk,bhk->bhv", state_BHVK, alpha_BTHK[:, t])
        # S_t = S_{t-1} diag(w_t) + u_t beta_t^T + v_t k_t^T
        state_BHVK = (
            state_BHVK * decay_BTHK[:, t, :, None, :]
            + torch.einsum("bhv,bhk->bhvk", u_BHV, beta_BTHK[:, t])
            + torch.einsum("bhv,bhk->bhvk", v_BTHV[:, t], k_BTHK[:, t])
        )
        # y_t = S_t r_t
        outputs.append(torch.einsum("bhvk,bhk->bhv", state_BHVK, r_BTHK[:, t]))
    y_BTHV = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(v_BTHV)
    return y_BTHV, state_BHVK
