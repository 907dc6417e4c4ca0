"""Attention to chosen chunks in plain torch: queries gathered per key chunk, one online softmax.

Axes: B batch, T tokens, H query heads, D head size; N groups (batch x key/value heads), R query
heads of a group, C chunks, S tokens of a chunk; Q = T·R query rows of a group; P query-chunk pairs.
README.md has the algorithm and its cost.
"""

from typing import Any

import torch
from torch import Tensor

from rwkvx_kernels.chunk_attention.common import from_chunks, to_chunks
from rwkvx_kernels.chunk_attention.torch_pairs import (
    LARGE_CHUNK,
    MANY_QUERIES,
    Pairs,
    own_tiles,
    query_tiles,
)
from rwkvx_kernels.chunk_select.common import from_groups, to_groups
from rwkvx_kernels.dispatch import without_autocast
from rwkvx_kernels.linear import linear
from rwkvx_kernels.linear.torch_form import mkl_is_fast, multiplies_bfloat16


def attend_torch(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, chunk_size: int) -> Tensor:
    """As `api.attend_chunks`, differentiable."""
    output: Tensor = _Attention.apply(q, k, v, chosen, chunk_size)
    return output


class _Attention(torch.autograd.Function):
    """Saves inputs, output, log-sum-exp and the selection; recomputes the weights."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, chunk_size: int
    ) -> Tensor:
        k_NCSD, v_NCSD = to_chunks(k, chunk_size), to_chunks(v, chunk_size)
        groups, offset = k.shape[2], k.shape[1] - q.shape[1]
        chosen_NTRP = chosen.unflatten(2, (groups, -1)).permute(0, 2, 1, 3, 4).flatten(0, 1)
        q_NTRD = to_groups(q, groups)
        o_NTRD, lse_NTR = attend_groups(q_NTRD, k_NCSD, v_NCSD, chosen_NTRP.long(), offset)
        ctx.save_for_backward(q, k, v, o_NTRD, lse_NTR, chosen_NTRP.to(torch.int32))
        ctx.chunk_size, ctx.offset = chunk_size, offset
        return from_groups(o_NTRD, len(q)).to(q.dtype)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o_NTRD, lse_NTR, chosen = ctx.saved_tensors
        q_NTRD, do_NTRD = to_groups(q, k.shape[2]), to_groups(do, k.shape[2])
        k_NCSD, v_NCSD = to_chunks(k, ctx.chunk_size), to_chunks(v, ctx.chunk_size)
        delta_NTR = (do_NTRD * o_NTRD).sum(-1)
        rows = (q_NTRD, do_NTRD, lse_NTR, delta_NTR)
        dq, dk, dv = _gradients(rows, k_NCSD, v_NCSD, chosen.long(), ctx.offset)
        dq = from_groups(dq, len(q)).to(q.dtype)
        return dq, from_chunks(dk, k), from_chunks(dv, v), None, None


def attend_groups(
    q_NTRD: Tensor, k_NCSD: Tensor, v_NCSD: Tensor, chosen_NTRP: Tensor, offset: int
) -> tuple[Tensor, Tensor]:
    """Queries at `offset` ...: output [N, T, R, D] and log-sum-exp [N, T, R].

    q_NTRD: float32 or float64; with keys and values in bfloat16, whose products a processor makes
    as fast as it can, numbers that bfloat16 holds.
    chosen_NTRP: int64 chunk numbers, -1 for none.
    """
    heads, dim = q_NTRD.shape[2:]
    size, topk = k_NCSD.shape[2], chosen_NTRP.shape[3] + 1
    narrow = k_NCSD.dtype == torch.bfloat16 and k_NCSD.is_cpu and multiplies_bfloat16()
    queries = q_NTRD.to(k_NCSD.dtype) if narrow else q_NTRD * dim**-0.5
    output, lse = torch.empty_like(q_NTRD), q_NTRD.new_empty(q_NTRD.shape[:3])
    for start, stop in query_tiles(q_NTRD.shape, offset, size, topk):
        q_tile = queries[:, start:stop].contiguous()
        own, own_lse = torch.empty_like(q_tile, dtype=lse.dtype), lse.new_empty(q_tile.shape[:3])
        for tile in own_tiles(offset + start, offset + stop, size):
            q = tile.queries(q_tile)
            keys, values, spoiled = _finite(tile.keys(k_NCSD), tile.keys(v_NCSD), q)
            o, tile_lse = _softmax(q, keys, values, tile.mask(heads, q.device))
            if spoiled is not None:
                o.masked_fill_(tile.seen(spoiled, heads), torch.nan)
            tile.put(own, o)
            tile.put(own_lse, tile_lse)
        if topk > 1 and offset + stop > size:
            pairs = Pairs(chosen_NTRP[:, start:stop], k_NCSD.shape[1], size)
            own, own_lse = _merge(pairs, q_tile.view(-1, dim), k_NCSD, v_NCSD, own, own_lse)
        output[:, start:stop], lse[:, start:stop] = own, own_lse
    return output, lse


def _finite(k: Tensor, v: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values [n, s, D] in the dtype of `like`, with zeros for what is not finite, so that
    a product with a weight of zero is zero; and where that was, by channel of the values."""
    k, v = k.to(like.dtype), v.to(like.dtype)
    if bool((k.sum() + v.sum()).isfinite()):
        return k, v, None
    spoiled = ~(v.isfinite() & k.isfinite().all(dim=-1, keepdim=True))
    return k.where(k.isfinite(), 0), v.where(v.isfinite(), 0), spoiled


def _softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax attention over one set of keys: [n, m, D], [n, s, D] -> output, log-sum-exp [n, m].

    `mask` [m, w] is True where one of the last w keys is not to be seen. In bfloat16 queries are
    unscaled (scaled ones would be rounded), sums float32, weights and output bfloat16.
    """
    bias, narrow = None, q.dtype == torch.bfloat16
    large = k.shape[1] >= LARGE_CHUNK and (len(q) == 1 or q.shape[1] >= MANY_QUERIES)
    if q.is_cpu and large and not narrow and not mkl_is_fast():
        return _softmax_large(q, k, v, mask)
    if mask is not None:
        bias = q.new_zeros(mask.shape[0], k.shape[1])
        bias[:, -mask.shape[1] :].masked_fill_(mask, -torch.inf)
    if q.is_cpu:
        one_head = (x.unsqueeze(1) for x in (q, k, v))
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *one_head, 0.0, False, attn_mask=bias, scale=q.shape[-1] ** -0.5 if narrow else 1.0
        )
        return output.squeeze(1), lse.squeeze(1)
    scores = torch.bmm(q, k.transpose(1, 2))
    lse = (scores if bias is None else scores.add_(bias)).logsumexp(dim=-1, keepdim=True)
    return torch.bmm(scores.sub_(lse).exp_(), v), lse.squeeze(-1)


def _softmax_large(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """`_softmax` with products of oneDNN that are worth a call each: five times as fast as those of
    MKL, which torch's flash attention calls, on an AMD; on an Intel two thirds as fast."""
    output, lse = torch.empty_like(q), q.new_empty(q.shape[:2])
    for i in range(len(q)):
        scores = linear(q[i], k[i], impl="torch")
        if mask is not None:
            scores[:, -mask.shape[1] :].masked_fill_(mask, -torch.inf)
        top = scores.amax(dim=-1)
        weights = torch.softmax(scores, dim=-1, out=scores)
        # The largest weight is one over the sum of exponentials.
        torch.sub(top, weights.amax(dim=-1).log_(), out=lse[i])
        output[i] = linear(weights, v[i].T, impl="torch")
    return output, lse


def _merge(
    pairs: Pairs, q_rows: Tensor, k_NCSD: Tensor, v_NCSD: Tensor, own: Tensor, own_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Attend the pairs' chunks and join them with the own chunk by their log-sum-exps."""
    if not pairs.count:
        return own, own_lse
    k_chunks, v_chunks = k_NCSD.flatten(0, 1), v_NCSD.flatten(0, 1)
    made, made_lse = pairs.empty(own), own_lse.new_empty(pairs.padded)
    for tile in pairs.tiles():
        q = q_rows[pairs.rows[tile.pairs]].unflatten(0, (-1, tile.size))
        keys, values = tile.gather(k_chunks).to(q.dtype), tile.gather(v_chunks).to(q.dtype)
        o, lse = _softmax(q, keys, values, None)
        made[tile.pairs], made_lse[tile.pairs] = o.flatten(0, 1), lse.flatten()
    lse_QP = made_lse[pairs.place.clamp_max(pairs.padded - 1)]
    all_lse = torch.cat([own_lse.reshape(-1, 1), lse_QP.masked_fill_(pairs.missing, -torch.inf)], 1)
    lse = all_lse.logsumexp(dim=1)
    weights = (all_lse - lse.unsqueeze(1)).exp_()
    selected = torch.nn.functional.embedding_bag(
        pairs.place, made, mode="sum", per_sample_weights=weights[:, 1:].contiguous()
    )
    output = selected.addcmul_(own.view(-1, own.shape[-1]), weights[:, :1])
    return output.view_as(own), lse.view_as(own_lse)


def _gradients(
    rows: tuple[Tensor, ...], k_NCSD: Tensor, v_NCSD: Tensor, chosen: Tensor, offset: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend_groups`: dq [N, T, R, D], dk and dv [N, C, S, D].

    rows: queries and output gradients [N, T, R, D], log-sum-exp and delta [N, T, R].
    """
    q_NTRD, others = rows[0], rows[1:]
    heads, dim = q_NTRD.shape[2:]
    size, scale = k_NCSD.shape[2], dim**-0.5
    # Not zeros_like, which would copy the strides of a transposed view.
    dq, dk, dv = (x.new_zeros(x.shape) for x in (q_NTRD, k_NCSD, v_NCSD))
    k_chunks, v_chunks = k_NCSD.flatten(0, 1), v_NCSD.flatten(0, 1)
    dk_chunks, dv_chunks = dk.view_as(k_chunks), dv.view_as(v_chunks)
    for start, stop in query_tiles(q_NTRD.shape, offset, size, chosen.shape[-1] + 1):
        inputs = [x[:, start:stop].contiguous() for x in (q_NTRD * scale, *others)]
        dq_tile = torch.empty_like(inputs[0])
        for tile in own_tiles(offset + start, offset + stop, size):
            own = [tile.queries(x) for x in inputs]
            keys, values, _ = _finite(tile.keys(k_NCSD), tile.keys(v_NCSD), q_NTRD)
            mask = tile.mask(heads, q_NTRD.device)
            dq_own, dk_own, dv_own = _softmax_gradients(own, keys, values, mask)
            tile.put(dq_tile, dq_own)
            tile.add(dk, dk_own)
            tile.add(dv, dv_own)
        pairs = Pairs(chosen[:, start:stop], k_NCSD.shape[1], size)
        if pairs.count:
            flat = [x.flatten(0, 2) for x in inputs]
            dq_pairs = pairs.empty(flat[0])
            for pair_tile in pairs.tiles():
                own = [x[pairs.rows[pair_tile.pairs]] for x in flat]
                # A padding pair has no weight, hence no gradient.
                own[2].masked_fill_(pairs.is_padding[pair_tile.pairs], torch.inf)
                own = [x.unflatten(0, (-1, pair_tile.size)) for x in own]
                keys, values = pair_tile.gather(k_chunks), pair_tile.gather(v_chunks)
                dq_own, dk_own, dv_own = _softmax_gradients(own, keys, values, None)
                dq_pairs[pair_tile.pairs] = dq_own.flatten(0, 1)
                dk_chunks.index_add_(0, pair_tile.chunks, dk_own)
                dv_chunks.index_add_(0, pair_tile.chunks, dv_own)
            summed = torch.nn.functional.embedding_bag(pairs.place, dq_pairs, mode="sum")
            dq_tile += summed.view_as(dq_tile)
        dq[:, start:stop] = dq_tile
    return dq.mul_(scale), dk, dv


def _softmax_gradients(
    rows: list[Tensor], k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients through one set of keys under the whole softmax: dq [n, m, D], dk, dv [n, s, D].

    rows: scaled queries and output gradients [n, m, D], log-sum-exp and delta [n, m].
    """
    q, do, lse, delta = rows
    weights = torch.bmm(q, k.transpose(1, 2)).sub_(lse.unsqueeze(-1)).exp_()
    dscores = torch.bmm(do, v.transpose(1, 2)).sub_(delta.unsqueeze(-1))
    dscores.mul_(weights)
    if mask is not None:  # masked entries have no gradient, whatever stands there
        for x in (weights, dscores):
            x[:, :, -mask.shape[1] :].masked_fill_(mask, 0)
    dv = torch.bmm(weights.transpose(1, 2), do)
    return torch.bmm(dscores, k), torch.bmm(dscores.transpose(1, 2), q), dv
