"""The chunk form of WKV7: forward and backward of a scan over chunks.

Axes: M chunks (scan steps one after the other), H heads, C tokens of a chunk, K key channels,
V value channels, B sequences. Inside, M and H are one dimension n. Symbols as in README.md.
"""

from collections.abc import Iterator
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkvx_kernels.dispatch import without_autocast


def scan_chunks(
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    segments: list[list[int]],
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over chunks, differentiable in every tensor.

    Args:
        r, log_decay, k, alpha, beta: [M, H, C, K]; v: [M, H, C, V].
        state: [B, H, V, K], sequences by falling length.
        segments: groups of consecutive scan steps, worked on at once; a step is the number of
            sequences that have a chunk there: the first ones.

    Returns:
        y [M, H, C, V] and the final states [B, H, V, K].
    """
    y, final = _Scan.apply(r, log_decay, k, v, alpha, beta, state, segments)
    return y, final


class _Chunks(NamedTuple):
    """What all chunks of a segment prepare in parallel, and what the backward pass needs again.

    query [n, 2C, K]: alpha and r, decayed from the centre of the chunk; key [n, 2C, K]: beta and
    k, decayed to it; scores [n, 2C, 2C]: their masked products; to_centre, to_end [n, 1, K]: decays
    of the state; grow_before, grow, shrink [n, C, K]: the exponentials of all of these.
    """

    query: Tensor
    key: Tensor
    scores: Tensor
    to_centre: Tensor
    to_end: Tensor
    grow_before: Tensor
    grow: Tensor
    shrink: Tensor


def _prepare(r: Tensor, log_decay: Tensor, k: Tensor, alpha: Tensor, beta: Tensor) -> _Chunks:
    n, size, width = r.shape
    g = log_decay.cumsum(dim=1)
    middle = g[:, (size - 1) // 2, None]
    centred = g - middle
    grow_before, grow, shrink = (centred - log_decay).exp_(), centred.exp(), (-centred).exp_()
    query, key = r.new_empty(n, 2 * size, width), r.new_empty(n, 2 * size, width)
    torch.mul(alpha, grow_before, out=query[:, :size])
    torch.mul(r, grow, out=query[:, size:])
    torch.mul(beta, shrink, out=key[:, :size])
    torch.mul(k, shrink, out=key[:, size:])
    # A_ab, A_ak, A_rb, A_rk in one product; alpha sees tokens before it, r its own too.
    scores = torch.bmm(query, key.transpose(1, 2)).mul_(_mask(size, r))
    return _Chunks(
        query, key, scores, middle.exp(), grow[:, -1:].clone(), grow_before, grow, shrink
    )


def _inverse(c: _Chunks) -> Tensor:
    """(I - A_ab)^-1 [n, C, C], by substitution (doubling explodes on repeated keys).

    Substituting into the identity and multiplying is four times less work in the triangular solver,
    which runs on one core, than substituting into the right-hand sides.
    """
    size = c.query.shape[1] // 2
    identity = torch.eye(size, dtype=c.query.dtype, device=c.query.device)
    return torch.linalg.solve_triangular(
        -c.scores[:, :size, :size],
        identity.expand(len(c.query), -1, -1),
        upper=False,
        unitriangular=True,
    )


def _mask(size: int, like: Tensor) -> Tensor:
    inclusive = torch.ones(size, size, dtype=like.dtype, device=like.device).tril_()
    strict = inclusive.tril(-1)
    return torch.cat([strict.repeat(1, 2), inclusive.repeat(1, 2)])


def _steps(segments: list[list[int]], heads: int) -> Iterator[tuple[slice, list[slice]]]:
    """For each segment: its rows among all n, and the rows of each step within the segment."""
    start = 0
    for counts in segments:
        ends = [heads * c for c in accumulate(counts)]
        steps = [slice(end - heads * c, end) for c, end in zip(counts, ends, strict=True)]
        yield slice(start, start + ends[-1]), steps
        start += ends[-1]


class _Scan(torch.autograd.Function):
    """Saves the inputs, the state before each chunk and U; recomputes the rest."""

    @staticmethod
    def forward(
        ctx: Any,
        r: Tensor,
        log_decay: Tensor,
        k: Tensor,
        v: Tensor,
        alpha: Tensor,
        beta: Tensor,
        state: Tensor,
        segments: list[list[int]],
    ) -> tuple[Tensor, Tensor]:
        heads = r.shape[1]
        rows = [x.flatten(0, 1) for x in (r, log_decay, k, v, alpha, beta)]
        current = state.flatten(0, 1).clone()
        saving = any(ctx.needs_input_grad)
        y = torch.empty_like(rows[3])
        befores, us = [], []
        for part, steps in _steps(segments, heads):
            before, u = _forward_segment([x[part] for x in rows], current, steps, y[part])
            if saving:
                befores.append(before)
                us.append(u)
        if saving:
            ctx.save_for_backward(*rows, current.clone(), torch.cat(befores), torch.cat(us))
            ctx.segments, ctx.heads = segments, heads
        return y.view(v.shape), current.view(state.shape)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        *rows, after, before, u = ctx.saved_tensors
        dy_rows = dy.flatten(0, 1)
        dstate, after = dfinal.flatten(0, 1).clone(), after.clone()
        grads = [torch.empty_like(x) for x in rows]
        for part, steps in reversed(list(_steps(ctx.segments, ctx.heads))):
            _backward_segment(
                [x[part] for x in rows],
                before[part],
                u[part],
                dy_rows[part],
                dstate,
                after,
                steps,
                [x[part] for x in grads],
            )
        shaped = [x.unflatten(0, (-1, ctx.heads)) for x in (*grads, dstate)]
        return (*shaped, None)


def _forward_segment(
    rows: list[Tensor], current: Tensor, steps: list[slice], y: Tensor
) -> tuple[Tensor, Tensor]:
    """One segment; updates `current` [B·H, V, K] and writes y.

    Returns the states before each chunk [n, V, K] and U [n, C, V].
    """
    r, log_decay, k, v, alpha, beta = rows
    size, width = r.shape[1:]
    c = _prepare(r, log_decay, k, alpha, beta)
    # W = (I - A_ab)^-1 alpha, U0 = (I - A_ab)^-1 A_ak V
    inverse = _inverse(c)
    w = torch.bmm(inverse, c.query[:, :size])
    u = torch.bmm(inverse, torch.bmm(c.scores[:, :size, size:], v))
    r_, beta_, k_ = c.query[:, size:], c.key[:, :size], c.key[:, size:]
    before = v.new_empty(len(v), v.shape[2], width)
    centred = torch.empty_like(before)
    for step in steps:
        active, here = current[: step.stop - step.start], centred[step]
        before[step] = active
        torch.mul(active, c.to_centre[step], out=here)
        # U = U0 + W S^T;  S' = (S + U^T beta + V^T k) decay
        u[step].baddbmm_(w[step], here.transpose(1, 2))
        new = torch.baddbmm(here, u[step].transpose(1, 2), beta_[step])
        new.baddbmm_(v[step].transpose(1, 2), k_[step])
        torch.mul(new, c.to_end[step], out=active)
    # y = r S^T + A_rb U + A_rk V
    torch.bmm(r_, centred.transpose(1, 2), out=y)
    y.baddbmm_(c.scores[:, size:, :size], u).baddbmm_(c.scores[:, size:, size:], v)
    return before, u


def _backward_segment(
    rows: list[Tensor],
    before: Tensor,
    u: Tensor,
    dy: Tensor,
    dstate: Tensor,
    after: Tensor,
    steps: list[slice],
    grads: list[Tensor],
) -> None:
    """One segment backwards: writes `grads`; `dstate` and `after` move to its beginning."""
    r, log_decay, k, v, alpha, beta = rows
    size, width = r.shape[1:]
    c = _prepare(r, log_decay, k, alpha, beta)
    a_rb = c.scores[:, size:, :size]
    # X = (I - A_ab)^-T (A_rb^T dY + beta dT^T), the part without dT for all chunks at once.
    transposed = _inverse(c).transpose(1, 2)
    x = torch.bmm(transposed, torch.bmm(a_rb.transpose(1, 2), dy))
    m = torch.bmm(transposed, c.key[:, :size])
    dt = torch.empty_like(before)
    dend, dcentre = r.new_empty(len(r), width), r.new_empty(len(r), width)
    for step in reversed(steps):
        ds, later = dstate[: step.stop - step.start], after[: step.stop - step.start]
        torch.sum(ds * later, dim=1, out=dend[step])
        torch.mul(ds, c.to_end[step], out=dt[step])
        x[step].baddbmm_(m[step], dt[step].transpose(1, 2))
        # dS = (dT + X^T alpha + dY^T r) decay to the centre
        new = torch.baddbmm(dt[step], x[step].transpose(1, 2), c.query[step, :size])
        new.baddbmm_(dy[step].transpose(1, 2), c.query[step, size:])
        torch.mul(new, c.to_centre[step], out=ds)
        later.copy_(before[step])
        torch.sum(ds * later, dim=1, out=dcentre[step])
    uv, z = torch.cat([u, v], dim=1), torch.cat([x, dy], dim=1)
    dscores = torch.bmm(z, uv.transpose(1, 2)).mul_(_mask(size, r))
    dquery = torch.bmm(dscores, c.key).baddbmm_(z, before * c.to_centre)
    dkey = torch.bmm(dscores.transpose(1, 2), c.query).baddbmm_(uv, dt)
    dr, dlog_decay, dk, dv, dalpha, dbeta = grads
    torch.bmm(c.scores[:, :, size:].transpose(1, 2), z, out=dv)
    dv.baddbmm_(c.key[:, size:], dt.transpose(1, 2))
    torch.mul(dquery[:, :size], c.grow_before, out=dalpha)
    torch.mul(dquery[:, size:], c.grow, out=dr)
    torch.mul(dkey[:, :size], c.shrink, out=dbeta)
    torch.mul(dkey[:, size:], c.shrink, out=dk)
    # Through the exponents: centred = g - g_mid, g = cumsum(log_decay).
    direct = dalpha * alpha
    dg = direct.addcmul(dr, r).addcmul_(dbeta, beta, value=-1).addcmul_(dk, k, value=-1)
    dg[:, -1] += dend
    dg[:, (size - 1) // 2] += dcentre - dg.sum(dim=1)
    torch.sub(dg.sum(dim=1, keepdim=True) + dg, dg.cumsum(dim=1), out=dlog_decay)
    dlog_decay.sub_(direct)
