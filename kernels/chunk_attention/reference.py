"""Attention to chosen chunks with full score matrices: the specification, in any float dtype.

Axes: B batch, T queries, S keys (S >= T: queries are the last T of S tokens), H query heads,
G key/value heads, C chunks, K chosen chunks, D head size. Memory grows with T·S: for tests, not for
use.
"""

import torch
from torch import Tensor


def attend_reference(
    q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, chosen_BTHK: Tensor, chunk_size: int
) -> Tensor:
    """One softmax over the own chunk, causally, and the chosen chunks; scale 1/sqrt(D).

    A chunk that is chosen twice counts twice. What a query reads and is not finite makes a NaN of
    that channel (a key: of all channels) of its output, and of no other query's.
    """
    queries, keys = q_BTHD.shape[1], k_BSGD.shape[1]
    group = q_BTHD.shape[2] // k_BSGD.shape[2]
    k_BSHD, v_BSHD = (x.repeat_interleave(group, dim=2) for x in (k_BSGD, v_BSGD))
    position_S = torch.arange(keys, device=q_BTHD.device)
    position_T = position_S[keys - queries :, None]
    own_TS = (position_T // chunk_size == position_S // chunk_size) & (position_T >= position_S)
    chunks = -(-keys // chunk_size)
    index = chosen_BTHK.long().masked_fill(chosen_BTHK < 0, chunks)
    times_BTHC = q_BTHD.new_zeros((*q_BTHD.shape[:3], chunks + 1))
    times_BTHC = times_BTHC.scatter_add(-1, index, torch.ones_like(index, dtype=q_BTHD.dtype))
    times_BTHS = times_BTHC[..., :-1].repeat_interleave(chunk_size, dim=-1)[..., :keys]
    times_BTHS = times_BTHS + own_TS[:, None]
    k_finite, v_finite = k_BSHD.isfinite(), v_BSHD.isfinite()
    k_BSHD, v_BSHD = k_BSHD.where(k_finite, 0), v_BSHD.where(v_finite, 0)
    scores_BTHS = torch.einsum("bthd,bshd->bths", q_BTHD, k_BSHD) * q_BTHD.shape[-1] ** -0.5
    weights_BTHS = (scores_BTHS + times_BTHS.log()).softmax(dim=-1)
    o_BTHD = torch.einsum("bths,bshd->bthd", weights_BTHS, v_BSHD)
    if bool(k_finite.all()) and bool(v_finite.all()):
        return o_BTHD
    bad_BSHD = ~(v_finite & k_finite.all(dim=-1, keepdim=True))
    return o_BTHD.masked_fill(
        torch.einsum("bths,bshd->bthd", times_BTHS, bad_BSHD.to(q_BTHD.dtype)) > 0, torch.nan
    )
