"""Selection of chunks with all scores at once: the specification, in any float dtype.

Memory grows with T·C: for tests, not for use. Axes as in common.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkvx_kernels.chunk_select import common


def select_reference(
    q_BTHD: Tensor, means_BGCD: Tensor, chunk_size: int, topk: int, offset: int, coarse: bool
) -> Tensor:
    """As `api.select_chunks`: [B, T, H, min(topk - 1, C)].

    MoBA (arXiv 2502.13189, eq. 5-6) with the current chunk always taken: the score of a chunk is
    the unscaled product of the query and the mean key; only chunks before the query's own one
    compete; the best topk - 1 are taken, all of them where there are no more.

    coarse: only those compete that a descent of the tree of chunks visits.
    """
    means_BHCD = means_BGCD.repeat_interleave(q_BTHD.shape[2] // means_BGCD.shape[1], dim=1)
    scores_BTHC = torch.einsum("bthd,bhcd->bthc", q_BTHD, means_BHCD)
    chunks = scores_BTHC.shape[-1]
    own_T = torch.arange(offset, offset + q_BTHD.shape[1], device=q_BTHD.device) // chunk_size
    competing = torch.arange(chunks, device=own_T.device) < own_T[:, None, None]
    if coarse:
        q_NTD, means_NCD = q_BTHD.transpose(1, 2).flatten(0, 1), means_BHCD.flatten(0, 1)
        visited_NTC = visited_chunks(q_NTD, means_NCD, own_T, topk)
        competing = competing & visited_NTC.view(-1, *q_BTHD.shape[2:0:-1], chunks).transpose(1, 2)
    competing = competing.expand_as(scores_BTHC)
    scores_BTHC = scores_BTHC.masked_fill(~competing, -torch.inf)
    best = scores_BTHC.topk(min(topk - 1, chunks), dim=-1).indices
    return best.masked_fill(~competing.gather(-1, best), -1)


def visited_chunks(q_NTD: Tensor, means_NCD: Tensor, own_T: Tensor, topk: int) -> Tensor:
    """Which chunks a descent of the tree visits, for queries in chunks `own_T`: [N, T, C].

    The tree of a query holds the chunks before its own, in whole runs; later ones all compete. At
    each level the children of the nodes kept compete with the nodes that have no parent.
    """
    visited = q_NTD.new_ones((*q_NTD.shape[:2], means_NCD.shape[1]), dtype=torch.bool)
    for runs in own_T.div(common.RUN, rounding_mode="floor").unique().tolist():
        chunks, queries = runs * common.RUN, own_T // common.RUN == runs
        if not chunks:
            continue
        order_NP = ordered_chunks(means_NCD, chunks)
        q_NQE = common.node_queries(q_NTD[:, queries])
        kept = q_NQE.new_zeros((*q_NQE.shape[:2], 0), dtype=torch.bool)
        for level in range(common.first_level(chunks), 0, -1):
            size = common.FANOUT**level
            nodes = common.nodes_of(means_NCD, order_NP[:, : chunks // size * size], size)
            scores = q_NQE @ nodes.transpose(1, 2)
            candidate = kept.repeat_interleave(common.FANOUT, dim=2)
            candidate = F.pad(candidate, (0, scores.shape[2] - candidate.shape[2]), value=True)
            width = min(common.kept_at(level, topk), scores.shape[2])
            best = scores.masked_fill(~candidate, -torch.inf).topk(width, dim=2).indices
            kept = torch.zeros_like(candidate).scatter(2, best, True) & candidate
        leaves = kept.repeat_interleave(common.FANOUT, dim=2)[:, :, :chunks]
        order = order_NP.unsqueeze(1).expand_as(leaves)
        visited[:, queries, :chunks] = torch.zeros_like(leaves).scatter(2, order, leaves)
    return visited


def ordered_chunks(means_NCD: Tensor, chunks: int) -> Tensor:
    """The chunks of the tree over the first `chunks` (whole runs), in the order of its leaves."""
    return torch.cat(
        [
            common.order_by_likeness(means_NCD[:, start:stop], run) + start
            for start, stop, run in common.regions_of(chunks)
        ],
        dim=1,
    )
