"""Top-k chunk attention with full score matrices: the specification, in any float dtype.

Axes: B batch, T queries, S keys (S >= T: queries are the last T of S tokens), H query heads,
G key/value heads, C chunks, D head size. Memory grows with T·S: for tests, not for use.
"""

import torch
from torch import Tensor

from rwkvx_kernels.chunk_attention.tree import FANOUT, RUN, beam_widths, node_queries, trees_of


def chunk_means(k_BSGD: Tensor, chunk_size: int) -> Tensor:
    """Representatives of the completed chunks: the mean of their keys, [B, C, G, D]."""
    complete = k_BSGD.shape[1] // chunk_size
    k = k_BSGD[:, : complete * chunk_size]
    return k.unflatten(1, (complete, chunk_size)).mean(dim=2)


def select_chunks(
    q_BTHD: Tensor, k_BSGD: Tensor, chunk_size: int, topk: int, coarse: bool = False
) -> Tensor:
    """Which completed past chunks each query reads, besides its own: boolean [B, H, T, C].

    MoBA (arXiv 2502.13189, eq. 5-6) with the current chunk always taken: the score of a chunk is
    the unscaled product of the query and the mean key; only chunks before the query's own one
    compete; the best topk - 1 are taken, all of them where there are no more.

    coarse: only those compete that a descent of the tree of chunks comes by.
    """
    means_BCGD = chunk_means(k_BSGD, chunk_size).repeat_interleave(_group(q_BTHD, k_BSGD), dim=2)
    scores_BHTC = torch.einsum("bthd,bchd->bhtc", q_BTHD, means_BCGD).detach()
    own = torch.arange(k_BSGD.shape[1], device=q_BTHD.device)[-q_BTHD.shape[1] :] // chunk_size
    competing = torch.arange(scores_BHTC.shape[-1], device=own.device) < own[:, None]
    if coarse:
        q_NTD, means_NCD = (x.transpose(1, 2).flatten(0, 1) for x in (q_BTHD, means_BCGD))
        met = competing_chunks(q_NTD.detach(), means_NCD.detach(), own, topk)
        competing = competing & met.view_as(scores_BHTC)
    scores_BHTC = scores_BHTC.masked_fill(~competing, -torch.inf)
    best = scores_BHTC.topk(min(topk - 1, scores_BHTC.shape[-1]), dim=-1).indices
    return torch.zeros_like(scores_BHTC, dtype=torch.bool).scatter(-1, best, True) & competing


def competing_chunks(q_NTD: Tensor, means_NCD: Tensor, own_T: Tensor, topk: int) -> Tensor:
    """Which chunks a descent of the tree comes by, for queries in chunks `own_T`: [N, T, C].

    The tree of a query holds the chunks before its own, in whole runs; later ones all compete. At
    each level the children of the nodes kept compete with the nodes that have no parent.
    """
    met = torch.ones(*q_NTD.shape[:2], means_NCD.shape[1], dtype=torch.bool, device=q_NTD.device)
    trees = trees_of(means_NCD)
    for runs in own_T.div(RUN, rounding_mode="floor").unique().tolist():
        tree, queries = trees(runs * RUN), own_T // RUN == runs
        q_NQE = node_queries(q_NTD[:, queries])
        kept = q_NQE.new_zeros((*q_NQE.shape[:2], 0), dtype=torch.bool)
        for level in range(tree.first_level, 0, -1):
            scores = q_NQE @ tree.level(level).transpose(1, 2)
            candidate = kept.repeat_interleave(FANOUT, dim=2)
            roots = scores.shape[2] - candidate.shape[2]
            candidate = torch.nn.functional.pad(candidate, (0, roots), value=True)
            width = min(beam_widths(topk)[level > 1], scores.shape[2])
            best = scores.masked_fill(~candidate, -torch.inf).topk(width, dim=2).indices
            kept = torch.zeros_like(candidate).scatter(2, best, True) & candidate
        leaves = kept.repeat_interleave(FANOUT, dim=2)[:, :, : tree.chunks]
        order = tree.order_NP.unsqueeze(1).expand_as(leaves)
        met[:, queries, : tree.chunks] = torch.zeros_like(leaves).scatter(2, order, leaves)
    return met


def chunk_attention_reference(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    chunk_size: int,
    topk: int,
    coarse: bool = False,
) -> Tensor:
    """One softmax over the own chunk, causally, and the selected chunks; scale 1/sqrt(D)."""
    queries, keys = q_BTHD.shape[1], k_BSGD.shape[1]
    group = _group(q_BTHD, k_BSGD)
    k_BSHD, v_BSHD = (x.repeat_interleave(group, dim=2) for x in (k_BSGD, v_BSGD))
    position_S = torch.arange(keys, device=q_BTHD.device)
    position_T = position_S[keys - queries :]
    own_TS = position_T[:, None] // chunk_size == position_S // chunk_size
    causal_TS = position_T[:, None] >= position_S
    selected_BHTC = select_chunks(q_BTHD, k_BSGD, chunk_size, topk, coarse)
    selected_BHTS = selected_BHTC.repeat_interleave(chunk_size, dim=-1)
    unfinished = keys - selected_BHTS.shape[-1]
    selected_BHTS = torch.nn.functional.pad(selected_BHTS, (0, unfinished))
    attended = (own_TS & causal_TS) | selected_BHTS
    scores_BHTS = torch.einsum("bthd,bshd->bhts", q_BTHD, k_BSHD) * q_BTHD.shape[-1] ** -0.5
    weights_BHTS = scores_BHTS.masked_fill(~attended, -torch.inf).softmax(dim=-1)
    return torch.einsum("bhts,bshd->bthd", weights_BHTS, v_BSHD)


def _group(q_BTHD: Tensor, k_BSGD: Tensor) -> int:
    return q_BTHD.shape[2] // k_BSGD.shape[2]
