"""The public chunk attention: checks its arguments, chooses an implementation and calls it."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rwkvx_kernels.chunk_attention.cache import KeyValueCache
from rwkvx_kernels.chunk_attention.cpu import attend_cache, attend_sequence, choose_cached
from rwkvx_kernels.chunk_attention.reference import chunk_attention_reference
from rwkvx_kernels.chunk_attention.tree import scored_whole
from rwkvx_kernels.dispatch import check_cu_seqlens, resolve_impl, without_autocast
from rwkvx_kernels.opaque import opaque

AVAILABLE = ("reference", "cpu", "triton")
SELECTIONS = ("flat", "coarse_to_fine")
# The Triton kernels: largest head size, what divides the chunk, queries that are decoded.
MOST_DIM, CHUNK_MULTIPLE, FEW_QUERIES = 128, 16, 8


def chosen_impl(device: torch.device | str, impl: str = "auto") -> str:
    """Name the implementation that `impl` stands for with tensors on `device`."""
    return resolve_impl(impl, torch.device(device), AVAILABLE)


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

    Keys are cut into chunks of `chunk_size` tokens. A chunk is scored, per query and query head,
    by the product of the query and its mean key (MoBA, arXiv 2502.13189); the best `topk - 1`
    completed chunks before the query's own are attended with it under one softmax, scale
    1/sqrt(D). With T <= topk · chunk_size this is dense causal attention. Differentiable in q, k
    and v; the choice of chunks has no gradient.

    Args:
        q: [B, T, H, D]; k, v: [B, T, Hkv, D], H a multiple of Hkv; float32, bfloat16, float16 or
            float64 (arithmetic in float32, in float64 for float64). T may be 0.
        chunk_size, topk: at least 1; topk counts the own chunk.
        cu_seqlens: [sequences + 1] integer offsets of sequences packed along T, batch size 1.
            Chunks are counted from the start of each sequence.
        impl: "auto", "reference", "cpu" or "triton".
        selection: "flat" scores every past chunk; "coarse_to_fine" those that a descent of a tree
            of chunks comes by, at a cost that grows with the logarithm of their number, and finds
            nearly always the same (README.md). The first 512 past chunks are always scored.

    Returns:
        o [B, T, H, D] in the dtype of `q`.

    Raises:
        ValueError: arguments that do not fit together.
        NotImplementedError: an implementation or selection that is not there yet.
    """
    _check(q, k, v, chunk_size, topk, selection)
    impl = _resolve(impl, q, chunk_size)
    if k.shape[1] != q.shape[1]:
        raise ValueError(f"q has {q.shape[1]} tokens, k and v have {k.shape[1]}")
    if q.numel() == 0:
        return q
    if impl == "triton":
        return _triton(q, k, v, chunk_size, topk, cu_seqlens, selection == "coarse_to_fine")
    if torch.compiler.is_compiling():
        return _opaque(q, k, v, chunk_size, topk, cu_seqlens, impl, selection)
    if cu_seqlens is not None:
        offsets = check_cu_seqlens(cu_seqlens, q.shape[0], q.shape[1])
        parts = [
            chunk_attention(
                q[:, a:b], k[:, a:b], v[:, a:b], chunk_size, topk, None, impl, selection
            )
            for a, b in pairwise(offsets)
        ]
        return torch.cat(parts, dim=1)
    coarse = selection == "coarse_to_fine"
    if impl == "cpu":
        return attend_sequence(q, k, v, chunk_size, topk, coarse)
    return _reference(q, k, v, chunk_size, topk, coarse)


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
            Triton kernels and T up to 8: nothing waits for their values, which are not checked.

    Returns:
        o [B, T, H, D] in the dtype of `q`.

    Raises:
        ValueError: arguments that do not fit together.
        NotImplementedError: an implementation or selection that is not there yet.
    """
    k, v = cache.k_BGSD.transpose(1, 2), cache.v_BGSD.transpose(1, 2)
    _check(q, k, v, cache.chunk_size, topk, selection)
    impl = _resolve(impl, q, cache.chunk_size)
    if isinstance(length, Tensor):
        if impl != "triton" or q.shape[1] > FEW_QUERIES or selection != "flat":
            raise NotImplementedError(
                f'lengths on the device need impl="triton", flat selection and at most '
                f'{FEW_QUERIES} queries, these are {q.shape[1]} for impl="{impl}", "{selection}"'
            )
        return _cached_triton(q.detach().contiguous(), cache, length, topk, False)
    if not q.shape[1] <= length <= cache.written:
        raise ValueError(f"{q.shape[1]} queries at length {length}: cache has {cache.written}")
    if q.numel() == 0:
        return q
    coarse = selection == "coarse_to_fine"
    if impl == "triton":
        return _cached_triton(q.detach().contiguous(), cache, length, topk, coarse)
    if torch.compiler.is_compiling():
        tensors = (cache.k_BGSD, cache.v_BGSD, cache.means_BGCD)
        shape = (length, cache.chunk_size, topk)
        return _opaque_cached(q.detach(), *tensors, *shape, impl, selection)
    if impl == "cpu":
        return attend_cache(q, cache, length, topk, coarse)
    return _reference(q, k[:, :length], v[:, :length], cache.chunk_size, topk, coarse)


def _fake(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


_opaque = opaque("chunk_attention_plain", _fake)(chunk_attention)


@opaque("chunk_attention_cached_plain", _fake)
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


def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    topk: int,
    cu_seqlens: Tensor | None,
    coarse: bool,
) -> Tensor:
    from rwkvx_kernels.chunk_attention import triton_ops, triton_packed

    args = [x.contiguous() for x in (q, k, v)]
    if cu_seqlens is None:
        o: Tensor = triton_ops.chunk_attention(*args, chunk_size, topk, coarse)[0]
    else:
        sizes = (chunk_size, topk, coarse)
        o = triton_packed.chunk_attention_packed(*args, cu_seqlens, *sizes)[0]
    return o


def has_decode_kernel(
    q: Tensor, chunk_size: int, selection: str = "flat", impl: str = "auto"
) -> bool:
    """Whether `cached_chunk_attention` of q [B, T, H, D] takes lengths on the device."""
    return selection == "flat" and _resolve("auto", q, chunk_size) == "triton"


def _cached_triton(
    q: Tensor, cache: KeyValueCache, length: int | Tensor, topk: int, coarse: bool
) -> Tensor:
    from rwkvx_kernels.chunk_attention import triton_ops

    forest: list[Tensor] = []
    if coarse and isinstance(length, int):
        chunks = length // cache.chunk_size
        forest = cache.forest(chunks).tensors() if chunks > scored_whole(topk) else []
    cached = (cache.k_BGSD, cache.v_BGSD, cache.means_BGCD, forest)
    if isinstance(length, int) and q.shape[1] > FEW_QUERIES:
        o: Tensor = triton_ops.chunk_attention_cached(q, *cached, length, cache.chunk_size, topk)
        return o
    if not isinstance(length, Tensor):
        length = torch.full((q.shape[0],), length, device=q.device)
    o = triton_ops.chunk_attention_decode(q, *cached, length, cache.chunk_size, topk)
    return o


def selected_chunks(
    q: Tensor, cache: KeyValueCache, length: int, topk: int, selection: str = "flat"
) -> Tensor:
    """Which past chunks `cached_chunk_attention` reads besides a query's own chunk.

    Returns:
        [B, T, H, topk - 1] int64, in no particular order; -1 where fewer past chunks exist.

    Raises:
        ValueError: arguments that do not fit together.
    """
    k = cache.k_BGSD[:, :, :length].transpose(1, 2)
    _check(q, k, k, cache.chunk_size, topk, selection)
    return choose_cached(q, cache, length, topk, selection == "coarse_to_fine")


def _resolve(impl: str, q: Tensor, chunk_size: int) -> str:
    """The implementation for these arguments; "auto" avoids Triton kernels that cannot do it."""
    resolved = chosen_impl(q.device, impl)
    if resolved != "triton":
        return resolved
    lacks = None
    if chunk_size % CHUNK_MULTIPLE:
        lacks = f"chunks of {chunk_size} tokens: give a multiple of {CHUNK_MULTIPLE}"
    elif q.shape[3] > MOST_DIM:
        lacks = f"heads of {q.shape[3]} channels: {MOST_DIM} at most"
    elif q.dtype == torch.float64:
        lacks = "float64"
    if lacks is None:
        return resolved
    if impl == "auto":
        return "cpu"
    raise NotImplementedError(f'impl="triton" does not have {lacks}')


def _reference(q: Tensor, k: Tensor, v: Tensor, chunk_size: int, topk: int, coarse: bool) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    q_wide, k_wide, v_wide = (x.to(wide) for x in (q, k, v))
    return chunk_attention_reference(q_wide, k_wide, v_wide, chunk_size, topk, coarse).to(q.dtype)


def _check(q: Tensor, k: Tensor, v: Tensor, chunk_size: int, topk: int, selection: str) -> None:
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
    if chunk_size < 1 or topk < 1:
        raise ValueError(f"chunk_size and topk must be >= 1, got {chunk_size} and {topk}")
    if selection not in SELECTIONS:
        raise NotImplementedError(f'selection="{selection}" is not there; available: {SELECTIONS}')
