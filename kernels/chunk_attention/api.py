"""The public chunk attention: checks its arguments, chooses an implementation and calls it."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rwkvx_kernels.chunk_attention.cache import KeyValueCache
from rwkvx_kernels.chunk_attention.common import (
    CHUNK_MULTIPLE,
    DECODED,
    FEW_KEYS,
    FEW_QUERIES,
    MOST_DIM,
    to_chunks,
)
from rwkvx_kernels.chunk_attention.reference import attend_reference
from rwkvx_kernels.chunk_attention.torch_form import attend_groups, attend_torch
from rwkvx_kernels.chunk_select import api as selecting
from rwkvx_kernels.chunk_select.common import (
    by_group,
    chunk_means,
    from_groups,
    scored_whole,
    to_groups,
)
from rwkvx_kernels.chunk_select.trees import Trees
from rwkvx_kernels.dispatch import (
    Choice,
    Facts,
    UnsupportedError,
    check_cu_seqlens,
    compiled_lacks,
    decide,
    facts_of,
    remembered,
    triton_lacks,
    without_autocast,
)
from rwkvx_kernels.tools.operators import opaque, operator


@remembered
def choose(
    facts: Facts, chunk_size: int, topk: int, tokens: int, dim: int = 64, impl: str = "auto"
) -> Choice:
    """Which implementation attends the chunks that were chosen for so many queries at once.

    `chunk_select.api.choose` says who chooses them, where `impl` is "auto" on a CPU; anywhere else
    it is the same implementation.
    """
    triton = triton_lacks(facts)
    if chunk_size % CHUNK_MULTIPLE:
        triton = triton or f"has chunks of a multiple of {CHUNK_MULTIPLE} tokens, not {chunk_size}"
    if dim > MOST_DIM:
        triton = triton or f"has heads of at most {MOST_DIM} channels, not {dim}"
    if not triton:
        from rwkvx_kernels.chunk_attention.options import STAGES, TABLE  # Triton may be missing
        from rwkvx_kernels.tools.triton_options import missing

        triton = missing(TABLE, STAGES, facts.dtype, dim, facts.device)
    lacks = {
        "triton": triton,
        "compiled": compiled_lacks(facts, torch.float32, torch.float64, torch.bfloat16),
        "torch": "",
        "reference": "",
    }
    few = tokens <= FEW_QUERIES or chunk_size * topk <= FEW_KEYS
    slower = "" if few else "reads keys query by query, slower than products of matrices"
    return decide(impl, facts, lacks, {"compiled": slower})


@without_autocast
def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    topk: int,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
    selection: str = "flat",
) -> Tensor:
    """Attention of each query to its own chunk, causally, and to the best completed past chunks.

    Keys are cut into chunks of `chunk_size` tokens. `select_chunks` chooses `topk - 1` completed
    chunks before the query's own, `attend_chunks` attends them with it under one softmax, scale
    1/sqrt(D). With T <= topk · chunk_size this is dense causal attention. Differentiable in q, k
    and v; the choice of chunks has no gradient.

    Args:
        q: [B, T, H, D]; k, v: [B, T, Hkv, D], H a multiple of Hkv; float32, bfloat16, float16 or
            float64 (arithmetic in float32, in float64 for float64). T may be 0.
        chunk_size, topk: at least 1; topk counts the own chunk.
        cu_seqlens: [sequences + 1] integer offsets of sequences packed along T, batch size 1.
            Chunks are counted from the start of each sequence.
        impl: "auto", "reference", "torch", "compiled" (Numba; a CPU, without gradients, no
            float16) or "triton", for both halves.
        selection: "flat" or "coarse_to_fine", see `select_chunks`.

    Returns:
        o [B, T, H, D] in the dtype of `q`.

    Raises:
        ValueError: arguments that do not fit together.
        UnsupportedError: an implementation asked for by name that cannot do this.
    """
    _check(q, k, v)
    selecting.check_selection(chunk_size, topk, selection)
    if k.shape[1] != q.shape[1]:
        raise ValueError(f"q has {q.shape[1]} tokens, k and v have {k.shape[1]}")
    facts = facts_of(q, k, v)
    chosen_impl = choose(facts, chunk_size, topk, q.shape[1], q.shape[3], impl).impl
    if q.numel() == 0:
        return q
    if chosen_impl == "triton":
        return _triton(q, k, v, cu_seqlens, chunk_size, topk, selection)
    if facts.traced:
        return _opaque(q, k, v, chunk_size, topk, cu_seqlens, impl, selection)
    if cu_seqlens is not None:
        rest = (chunk_size, topk, None, impl, selection)
        parts = [
            chunk_attention(q[:, a:b], k[:, a:b], v[:, a:b], *rest)
            for a, b in pairwise(check_cu_seqlens(cu_seqlens, q.shape[0], q.shape[1]))
        ]
        return torch.cat(parts, dim=1)
    means = chunk_means(k.detach().transpose(1, 2), chunk_size)
    trees = Trees(means.flatten(0, 1)) if selection == "coarse_to_fine" else None
    slots = selecting.slots_of(topk, selecting.past_chunks(q, 0, chunk_size), chosen_impl)
    select_impl = _select_impl(impl, chosen_impl, facts, selection)
    chosen = selecting.select(select_impl, q, means, chunk_size, slots + 1, 0, trees)
    return _attend(chosen_impl, q, k, v, chosen, chunk_size)


@without_autocast
def attend_chunks(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, chunk_size: int, impl: str = "auto"
) -> Tensor:
    """Attention of each query to its own chunk, causally, and to past chunks chosen by anybody.

    One softmax over all of it, scale 1/sqrt(D). Differentiable in q, k and v. What a query does not
    read never matters to it, NaN included; of what it reads, NaN and infinities may make NaN.

    Args:
        q: [B, T, H, D], the last T of S tokens; k, v: [B, S, Hkv, D], as for `chunk_attention`.
        chosen: [B, T, H, K] integers, chunks before the query's own in any order; -1 for none, any
            number of times. A chunk that stands twice counts twice.
        chunk_size: at least 1. impl: as for `chunk_attention`.

    Returns:
        o [B, T, H, D] in the dtype of `q`.

    Raises:
        ValueError: arguments that do not fit together; on a CPU, a chunk that is none before the
            query's own.
        UnsupportedError: an implementation asked for by name that cannot do this.
    """
    _check(q, k, v)
    selecting.check_selection(chunk_size, 1, "flat")
    tokens, first = q.shape[1], k.shape[1] - q.shape[1]
    if first < 0:
        raise ValueError(f"{tokens} queries are the last of {k.shape[1]} tokens")
    if chosen.dim() != 4 or chosen.shape[:3] != q.shape[:3] or chosen.is_floating_point():
        raise ValueError(f"chosen must be integers {[*q.shape[:3], 'K']}, got {list(chosen.shape)}")
    facts = facts_of(q, k, v)
    impl = choose(facts, chunk_size, chosen.shape[3] + 1, tokens, q.shape[3], impl).impl
    if q.numel() == 0:
        return q
    if facts.traced and impl != "triton":
        return _opaque_attend(q, k, v, chosen, chunk_size, impl)
    if not facts.traced and chosen.device.type == "cpu":
        own = torch.arange(first, first + tokens).view(-1, 1, 1) // chunk_size
        if bool(((chosen >= own) | (chosen < -1)).any()):
            raise ValueError("chosen names chunks that do not lie before the query's own")
    return _attend(impl, q, k, v, chosen, chunk_size)


@without_autocast
def cached_chunk_attention(
    q: Tensor,
    cache: KeyValueCache,
    length: int | Tensor,
    topk: int,
    impl: str = "auto",
    selection: str = "flat",
) -> Tensor:
    """`chunk_attention` of the last T of the `length` tokens that `cache` holds; no gradient.

    Args:
        q: [B, T, H, D]; the T tokens are already in the cache.
        length: tokens of the sequence, including those T; or of each sequence, [B] int64, for the
            Triton kernels and T up to 8: nothing waits for their values, which are not checked, and
            for coarse-to-fine selection the cache was grown to them (`KeyValueCache.forest`).

    Returns:
        o [B, T, H, D] in the dtype of `q`.

    Raises:
        ValueError: arguments that do not fit together.
        UnsupportedError: an implementation asked for by name, or lengths on the device, where that
            cannot be done.
    """
    k, v = cache.k_BGSD.transpose(1, 2), cache.v_BGSD.transpose(1, 2)
    _check(q, k, v)
    size, tokens = cache.chunk_size, q.shape[1]
    selecting.check_selection(size, topk, selection)
    facts = Facts(q.device, q.dtype, traced=torch.compiler.is_compiling())
    chosen_impl = choose(facts, size, topk, tokens, q.shape[3], impl).impl
    if isinstance(length, Tensor):
        if chosen_impl != "triton" or tokens > DECODED:
            raise UnsupportedError(
                f'lengths on the device need impl="triton" and at most {DECODED} queries, these '
                f'are {tokens} for impl="{chosen_impl}"'
            )
        forest = [] if selection == "flat" else cache.forest(topk)
        return _decode(q, cache, length, topk, forest)
    if not tokens <= length <= cache.written:
        raise ValueError(f"{tokens} queries at length {length}: cache has {cache.written}")
    if q.numel() == 0:
        return q
    if facts.traced and chosen_impl != "triton":
        tensors = (cache.k_BGSD, cache.v_BGSD, cache.means_BGCD)
        return _opaque_cached(q.detach(), *tensors, length, size, topk, impl, selection)
    return _cached(q.detach(), cache, length, topk, impl, chosen_impl, selection)


def selected_chunks(
    q: Tensor, cache: KeyValueCache, length: int, topk: int, selection: str = "flat"
) -> Tensor:
    """`select_chunks` of the last T of the `length` tokens that `cache` holds."""
    numbers = (cache.chunk_size, topk, length - q.shape[1], selection)
    return selecting.select_chunks(q, cache.means_BGCD, *numbers, trees=cache.trees)


def has_decode_kernel(q: Tensor, chunk_size: int) -> bool:
    """Whether `cached_chunk_attention` of q [B, T, H, D] takes lengths on the device."""
    return choose(Facts(q.device, q.dtype), chunk_size, 1, 1, q.shape[3]).impl == "triton"


def _select_impl(impl: str, chosen_impl: str, facts: Facts, selection: str) -> str:
    """Who chooses: on a CPU its own "auto" beside that of attention."""
    if impl != "auto" or facts.device.type != "cpu":
        return chosen_impl
    return selecting.choose(facts, selection).impl


def _attend(
    impl: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    chunk_size: int,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """`attend_chunks` by an implementation that was chosen; packed sequences by Triton alone."""
    if impl == "triton":
        from rwkvx_kernels.chunk_attention.triton_ops import attend_triton  # may be missing

        return attend_triton(q, k, v, chosen, cu_seqlens, chunk_size)[0]
    if impl == "torch":
        return attend_torch(q, k, v, chosen, chunk_size)
    if impl == "reference":
        wide = torch.promote_types(q.dtype, torch.float32)
        args = (q.to(wide), k.to(wide), v.to(wide))
        return attend_reference(*args, chosen, chunk_size).to(q.dtype)
    groups, first = k.shape[2], k.shape[1] - q.shape[1]
    k_NCSD, v_NCSD = to_chunks(k.detach(), chunk_size), to_chunks(v.detach(), chunk_size)
    q_NTRD, chosen_NTRP = to_groups(q.detach(), groups), by_group(chosen, groups).long()
    o_NTRD = _attend_groups(impl, q_NTRD, k_NCSD, v_NCSD, chosen_NTRP, first)
    return from_groups(o_NTRD, len(q)).to(q.dtype)


def _attend_groups(
    impl: str, q_NTRD: Tensor, k_NCSD: Tensor, v_NCSD: Tensor, chosen_NTRP: Tensor, first: int
) -> Tensor:
    """ "torch" or "compiled" attention, without gradients, of queries laid out by group."""
    if impl == "torch":
        return attend_groups(q_NTRD, k_NCSD, v_NCSD, chosen_NTRP, first)[0]
    from rwkvx_kernels.chunk_attention.numba_form import attend_compiled  # takes half a second

    chunks = (k_NCSD.contiguous(), v_NCSD.contiguous(), chosen_NTRP.contiguous())
    return attend_compiled(q_NTRD, *chunks, first)


@torch.no_grad()
def _cached(
    q: Tensor,
    cache: KeyValueCache,
    length: int,
    topk: int,
    impl: str,
    chosen_impl: str,
    selection: str,
) -> Tensor:
    """`cached_chunk_attention` by an implementation that was chosen."""
    trees = cache.trees if selection == "coarse_to_fine" else None
    first, size = length - q.shape[1], cache.chunk_size
    past = selecting.past_chunks(q, first, size)
    if chosen_impl == "triton" and q.shape[1] <= DECODED:
        forest = trees.forest(past) if trees and past > scored_whole(topk) else []
        return _decode(q, cache, torch.full((len(q),), length, device=q.device), topk, forest)
    if chosen_impl == "compiled" and q.shape[1] == 1 and trees is None:
        from rwkvx_kernels.chunk_attention.numba_form import attend_one  # takes half a second

        cached = (cache.k_BGSD, cache.v_BGSD, cache.means_BGCD)
        return attend_one(q, *cached, first, size, topk)
    slots = selecting.slots_of(topk, past, chosen_impl)
    select_impl = _select_impl(impl, chosen_impl, Facts(q.device, q.dtype), selection)
    if chosen_impl in ("triton", "reference"):
        k, v = (x.transpose(1, 2)[:, :length] for x in (cache.k_BGSD, cache.v_BGSD))
        means = cache.means_BGCD
        chosen = selecting.select(select_impl, q, means, size, slots + 1, first, trees)
        return _attend(chosen_impl, q, k, v, chosen, size)
    # Laid out by group once for both halves.
    q_NTRD, means_NCD = to_groups(q, cache.k_BGSD.shape[1]), cache.means_BGCD.flatten(0, 1)
    args = (means_NCD, trees and trees.tree, first, size, slots + 1)
    chosen = selecting.select_groups(select_impl, q_NTRD, *args)
    k, v = (x.flatten(0, 1).unflatten(1, (-1, size)) for x in (cache.k_BGSD, cache.v_BGSD))
    o_NTRD = _attend_groups(chosen_impl, q_NTRD, k, v, chosen, first)
    return from_groups(o_NTRD, len(q)).to(q.dtype)


def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    topk: int,
    selection: str,
) -> Tensor:
    from rwkvx_kernels.chunk_select.triton_ops import select_whole

    slots = selecting.slots_of(topk, q.shape[1] // chunk_size, "triton")
    numbers = (selection == "coarse_to_fine", chunk_size, slots + 1)
    chosen = select_whole(q.detach(), k.detach(), cu_seqlens, *numbers)
    return _attend("triton", q, k, v, chosen, chunk_size, cu_seqlens)


def _decode(
    q: Tensor, cache: KeyValueCache, lengths: Tensor, topk: int, forest: list[Tensor]
) -> Tensor:
    from rwkvx_kernels.chunk_attention.triton_ops import decode_triton

    slots = selecting.slots_of(topk, cache.means_BGCD.shape[2], "triton")
    cached = (cache.k_BGSD, cache.v_BGSD, cache.means_BGCD, forest)
    return decode_triton(q.detach(), *cached, lengths, cache.chunk_size, slots + 1)


def _fake(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


_opaque = opaque("chunk_attention_plain", _fake)(chunk_attention)
_opaque_attend = opaque("attend_chunks_plain", _fake)(attend_chunks)


@operator("chunk_attention_cached_plain", _fake)
def _opaque_cached(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    means: Tensor,
    length: int,
    chunk_size: int,
    topk: int,
    impl: str,
    selection: str,
) -> Tensor:
    cache = KeyValueCache.of(k, v, means, chunk_size, length)
    return cached_chunk_attention(q, cache, length, topk, impl, selection)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(
            "q must be [B, T, H, D] and k, v [B, T, Hkv, D], got "
            f"{list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"batch and head size of q {list(q.shape)} and k {list(k.shape)} differ")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are no multiple of {k.shape[2]} key heads")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k, v must share a float dtype: {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k, v are on {q.device}, {k.device}, {v.device}")
