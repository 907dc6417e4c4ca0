"""Top-k chunk attention in plain torch: queries gathered per key chunk, one online softmax.

Axes: B batch, T tokens, H query heads, D head size; N groups (batch x key/value heads), R query
heads of a group, C chunks, S tokens of a chunk; Q = T·R query rows of a group; P query-chunk pairs.
README.md has the algorithm and its cost.
"""

from typing import Any

import torch
from torch import Tensor

from rwkvx_kernels.chunk_attention.cache import KeyValueCache
from rwkvx_kernels.chunk_attention.cpu_coarse import TreeOf, select
from rwkvx_kernels.chunk_attention.cpu_pairs import LARGE_CHUNK, Pairs, own_pieces, query_tiles
from rwkvx_kernels.chunk_attention.tree import trees_of
from rwkvx_kernels.dispatch import without_autocast
from rwkvx_kernels.linear import linear

# Up to so many queries at once, or keys of each, a compiled loop beats products of matrices.
FEW_QUERIES = 4
FEW_KEYS = 512


def attend_sequence(
    q: Tensor, k: Tensor, v: Tensor, chunk_size: int, topk: int, coarse: bool
) -> Tensor:
    """Whole sequences, differentiable: q [B, T, H, D], k and v [B, T, G, D] -> [B, T, H, D]."""
    output: Tensor = _ChunkAttention.apply(q, k, v, chunk_size, topk, coarse)
    return output


def attend_cache(q: Tensor, cache: KeyValueCache, length: int, topk: int, coarse: bool) -> Tensor:
    """The last T of `length` cached tokens: q [B, T, H, D] -> [B, T, H, D]; no gradient."""
    size, tokens = cache.chunk_size, q.shape[1]
    compiled = (cache.means_BGCD.dtype, torch.bfloat16)
    on_cpu = q.device.type == "cpu" and cache.k_BGSD.dtype in compiled
    if on_cpu and tokens == 1 and not coarse:
        from rwkvx_kernels.chunk_attention.cpu_compiled import attend_one

        return attend_one(q.detach(), cache, length, topk)
    cached = (cache.k_BGSD, cache.v_BGSD)
    k_NCSD, v_NCSD = (x.flatten(0, 1).unflatten(1, (-1, size)) for x in cached)
    with torch.no_grad():
        q_NTRD = _to_groups(q, cache.k_BGSD.shape[1])
        means, offset = cache.means_BGCD.flatten(0, 1), length - tokens
        trees = cache.tree if coarse else None
        if on_cpu and (tokens <= FEW_QUERIES or size * topk <= FEW_KEYS):
            from rwkvx_kernels.chunk_attention.cpu_compiled import attend_compiled

            chosen = select(q_NTRD, means, trees, offset, size, topk)
            scaled = q_NTRD * q.shape[-1] ** -0.5
            o_NTRD = attend_compiled(scaled, k_NCSD, v_NCSD, chosen, offset)
        else:
            o_NTRD = _attend(q_NTRD, k_NCSD, v_NCSD, means, offset, topk, trees)[0]
    return _from_groups(o_NTRD, q)


def choose_cached(q: Tensor, cache: KeyValueCache, length: int, topk: int, coarse: bool) -> Tensor:
    """The past chunks that `attend_cache` reads: [B, T, H, topk - 1]."""
    with torch.no_grad():
        q_NTRD = _to_groups(q, cache.k_BGSD.shape[1])
        means, trees = cache.means_BGCD.flatten(0, 1), cache.tree if coarse else None
        start = length - q.shape[1]
        chosen = select(q_NTRD, means, trees, start, cache.chunk_size, topk)
    return chosen.unflatten(0, (q.shape[0], -1)).permute(0, 2, 1, 3, 4).flatten(2, 3)


def _to_groups(q: Tensor, groups: int) -> Tensor:
    """[B, T, H, D] -> [B·G, T, R, D], at least float32."""
    q = q.unflatten(2, (groups, -1)).permute(0, 2, 1, 3, 4)
    return q.to(torch.promote_types(q.dtype, torch.float32)).flatten(0, 1).contiguous()


def _from_groups(x_NTRD: Tensor, like: Tensor) -> Tensor:
    x = x_NTRD.unflatten(0, (like.shape[0], -1)).permute(0, 2, 1, 3, 4)
    return x.flatten(2, 3).to(like.dtype)


def _to_chunks(k: Tensor, chunk_size: int) -> Tensor:
    """[B, T, G, D] -> [B·G, C, S, D], at least float32, zeros after the end."""
    k = k.to(torch.promote_types(k.dtype, torch.float32)).transpose(1, 2).flatten(0, 1)
    missing = -k.shape[1] % chunk_size
    return torch.nn.functional.pad(k, (0, 0, 0, missing)).unflatten(1, (-1, chunk_size))


def _from_chunks(k_NCSD: Tensor, like: Tensor) -> Tensor:
    k = k_NCSD.flatten(1, 2)[:, : like.shape[1]]
    return k.unflatten(0, (like.shape[0], -1)).transpose(1, 2).to(like.dtype)


class _ChunkAttention(torch.autograd.Function):
    """Saves inputs, output, log-sum-exp and the selection; recomputes the weights."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, chunk_size: int, topk: int, coarse: bool
    ) -> Tensor:
        q_NTRD = _to_groups(q, k.shape[2])
        k_NCSD, v_NCSD = _to_chunks(k, chunk_size), _to_chunks(v, chunk_size)
        means_NCD = k_NCSD.mean(dim=2)
        trees = trees_of(means_NCD) if coarse else None
        o_NTRD, lse_NTR, chosen = _attend(q_NTRD, k_NCSD, v_NCSD, means_NCD, 0, topk, trees)
        o = _from_groups(o_NTRD, q)
        ctx.save_for_backward(q, k, v, o_NTRD, lse_NTR, chosen.to(torch.int32))
        ctx.chunk_size = chunk_size
        return o

    @staticmethod
    @without_autocast
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o_NTRD, lse_NTR, chosen = ctx.saved_tensors
        q_NTRD, do_NTRD = _to_groups(q, k.shape[2]), _to_groups(do, k.shape[2])
        k_NCSD, v_NCSD = _to_chunks(k, ctx.chunk_size), _to_chunks(v, ctx.chunk_size)
        delta_NTR = (do_NTRD * o_NTRD).sum(-1)
        dq, dk, dv = _attend_backward(
            q_NTRD, k_NCSD, v_NCSD, do_NTRD, lse_NTR, delta_NTR, chosen.long()
        )
        return _from_groups(dq, q), _from_chunks(dk, k), _from_chunks(dv, v), None, None, None


def _attend(
    q_NTRD: Tensor,
    k_NCSD: Tensor,
    v_NCSD: Tensor,
    means_NCD: Tensor,
    offset: int,
    topk: int,
    trees: TreeOf | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries at `offset` ... against the chunks: output, log-sum-exp [N, T, R], chosen chunks."""
    tokens, heads, dim = q_NTRD.shape[1:]
    size = k_NCSD.shape[2]
    chosen = select(q_NTRD, means_NCD, trees, offset, size, topk)
    scaled = q_NTRD * dim**-0.5
    output, lse = torch.empty_like(q_NTRD), q_NTRD.new_empty(q_NTRD.shape[:3])
    for start, stop in query_tiles(q_NTRD.shape, offset, size, topk):
        q_tile = scaled[:, start:stop].contiguous()
        own, own_lse = torch.empty_like(q_tile), q_tile.new_empty(q_tile.shape[:3])
        for piece in own_pieces(offset + start, offset + stop, size):
            q, keys = piece.queries(q_tile), piece.keys(k_NCSD).to(q_tile.dtype)
            o, part_lse = _partial(q, keys, piece.keys(v_NCSD), piece.mask(heads, q.device))
            piece.put(own, o)
            piece.put(own_lse, part_lse)
        if topk > 1 and offset + stop > size:
            pairs = Pairs(chosen[:, start:stop], k_NCSD.shape[1], size)
            own, own_lse = _merge(pairs, q_tile.view(-1, dim), k_NCSD, v_NCSD, own, own_lse)
        output[:, start:stop], lse[:, start:stop] = own, own_lse
    return output, lse, chosen


def _partial(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax attention over one set of keys: [n, m, D], [n, s, D] -> output, log-sum-exp [n, m].

    `mask` [m, w] is True where one of the last w keys is not to be seen.
    """
    bias, v = None, v.to(q.dtype)
    if q.device.type == "cpu" and k.shape[1] >= LARGE_CHUNK:
        return _partial_large(q, k, v, mask)
    if mask is not None:
        bias = q.new_zeros(mask.shape[0], k.shape[1])
        bias[:, -mask.shape[1] :].masked_fill_(mask, -torch.inf)
    if q.device.type == "cpu":
        one_head = (x.unsqueeze(1) for x in (q, k, v))
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *one_head, 0.0, False, attn_mask=bias, scale=1.0
        )
        return output.squeeze(1), lse.squeeze(1)
    scores = torch.bmm(q, k.transpose(1, 2))
    lse = (scores if bias is None else scores.add_(bias)).logsumexp(dim=-1, keepdim=True)
    return torch.bmm(scores.sub_(lse).exp_(), v), lse.squeeze(-1)


def _partial_large(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """`_partial` with products that are worth a call each: twice as fast as a batch of them."""
    from rwkvx_kernels.chunk_attention.cpu_compiled import exponentials

    output, lse = torch.empty_like(q), q.new_empty(q.shape[:2])
    for i in range(len(q)):
        scores = linear(q[i], k[i])
        total = exponentials(scores, 0 if mask is None else mask.shape[1], lse[i])
        torch.div(linear(scores, v[i].T), total.unsqueeze(-1), out=output[i])
    return output, lse


def _merge(
    pairs: Pairs, q_rows: Tensor, k_NCSD: Tensor, v_NCSD: Tensor, own: Tensor, own_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Attend the pairs' chunks and join them with the own-chunk part by their log-sum-exps."""
    if not pairs.count:
        return own, own_lse
    k_chunks, v_chunks = k_NCSD.flatten(0, 1), v_NCSD.flatten(0, 1)
    part = q_rows.new_empty((pairs.padded, q_rows.shape[1]))
    part_lse = q_rows.new_empty(pairs.padded)
    for tile in pairs.tiles():
        q = q_rows[pairs.rows[tile.pairs]].unflatten(0, (-1, tile.block))
        keys, values = tile.gather(k_chunks).to(q.dtype), tile.gather(v_chunks)
        o, lse = _partial(q, keys, values, None)
        part[tile.pairs], part_lse[tile.pairs] = o.flatten(0, 1), lse.flatten()
    lse_QP = part_lse[pairs.place].masked_fill_(pairs.missing, -torch.inf)
    all_lse = torch.cat([own_lse.reshape(-1, 1), lse_QP], dim=1)
    lse = all_lse.logsumexp(dim=1)
    weights = (all_lse - lse.unsqueeze(1)).exp_()
    selected = torch.nn.functional.embedding_bag(
        pairs.place, part, mode="sum", per_sample_weights=weights[:, 1:].contiguous()
    )
    output = selected.addcmul_(own.view(-1, own.shape[-1]), weights[:, :1])
    return output.view_as(own), lse.view_as(own_lse)


def _attend_backward(
    q_NTRD: Tensor,
    k_NCSD: Tensor,
    v_NCSD: Tensor,
    do_NTRD: Tensor,
    lse_NTR: Tensor,
    delta_NTR: Tensor,
    chosen: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `_attend` at offset 0: dq [N, T, R, D], dk and dv [N, C, S, D]."""
    heads, dim = q_NTRD.shape[2:]
    size, scale = k_NCSD.shape[2], dim**-0.5
    # Not zeros_like, which would copy the strides of a transposed view.
    dq, dk, dv = (x.new_zeros(x.shape) for x in (q_NTRD, k_NCSD, v_NCSD))
    k_chunks, v_chunks = k_NCSD.flatten(0, 1), v_NCSD.flatten(0, 1)
    dk_chunks, dv_chunks = dk.view_as(k_chunks), dv.view_as(v_chunks)
    for start, stop in query_tiles(q_NTRD.shape, 0, size, chosen.shape[-1] + 1):
        tile_inputs = (q_NTRD * scale, do_NTRD, lse_NTR, delta_NTR)
        q_t, do_t, lse_t, delta_t = (x[:, start:stop].contiguous() for x in tile_inputs)
        dq_t = torch.empty_like(q_t)
        for piece in own_pieces(start, stop, size):
            rows = [piece.queries(x) for x in (q_t, do_t, lse_t, delta_t)]
            keys, values = piece.keys(k_NCSD), piece.keys(v_NCSD)
            mask = piece.mask(heads, q_t.device)
            dq_p, dk_p, dv_p = _partial_backward(rows, keys, values, mask)
            piece.put(dq_t, dq_p)
            piece.add(dk, dk_p)
            piece.add(dv, dv_p)
        pairs = Pairs(chosen[:, start:stop], k_NCSD.shape[1], size)
        if pairs.count:
            flat = (q_t.view(-1, dim), do_t.view(-1, dim), lse_t.view(-1), delta_t.view(-1))
            dq_pairs = q_t.new_empty((pairs.padded, dim))
            for tile in pairs.tiles():
                rows = [x[pairs.rows[tile.pairs]] for x in flat]
                # A padding pair has no weight, hence no gradient.
                rows[2].masked_fill_(pairs.is_padding[tile.pairs], torch.inf)
                rows = [x.unflatten(0, (-1, tile.block)) for x in rows]
                keys, values = tile.gather(k_chunks), tile.gather(v_chunks)
                dq_p, dk_p, dv_p = _partial_backward(rows, keys, values, None)
                dq_pairs[tile.pairs] = dq_p.flatten(0, 1)
                dk_chunks.index_add_(0, tile.chunks, dk_p)
                dv_chunks.index_add_(0, tile.chunks, dv_p)
            present = (~pairs.missing).to(dq_pairs.dtype)
            dq_t += torch.nn.functional.embedding_bag(
                pairs.place, dq_pairs, mode="sum", per_sample_weights=present
            ).view_as(dq_t)
        dq[:, start:stop] = dq_t
    return dq.mul_(scale), dk, dv


def _partial_backward(
    rows: list[Tensor], k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients through one set of keys under the whole softmax: dq [n, m, D], dk, dv [n, s, D].

    rows: scaled queries and output gradients [n, m, D], log-sum-exp and delta [n, m].
    """
    q, do, lse, delta = rows
    weights = torch.bmm(q, k.transpose(1, 2)).sub_(lse.unsqueeze(-1)).exp_()
    if mask is not None:
        weights[:, :, -mask.shape[1] :].masked_fill_(mask, 0)
    dv = torch.bmm(weights.transpose(1, 2), do)
    dscores = torch.bmm(do, v.transpose(1, 2)).sub_(delta.unsqueeze(-1)).mul_(weights)
    return torch.bmm(dscores, k), torch.bmm(dscores.transpose(1, 2), q), dv
