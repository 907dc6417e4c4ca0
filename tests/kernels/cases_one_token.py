"""What `ahead_of_time.py` compiles of one token through blocks."""

import torch
from ahead_of_time import Case

from rwkvx_kernels.chunk_select.common import DENSE_NODES, FANOUT
from rwkvx_kernels.chunk_select.forest import room_for
from rwkvx_kernels.one_token import BlockWeights, Cache, Memory, embed, logits, read_block
from rwkvx_kernels.token_shift import Norm

# Chunks of a forest whose descent has two levels.
MANY = 2 * DENSE_NODES * FANOUT
RANKS = (64, 64, 32, 128)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def weights(
    dtype: torch.dtype, width: int, size: int, first: bool = False, int8: bool = False
) -> BlockWeights:
    """Of an RWKV-7 block; int8: of its matrices."""
    inner = 4 * width

    def matrix(outputs: int, inputs: int) -> torch.Tensor:
        return empty(outputs, inputs, dtype=torch.int8 if int8 else dtype)

    def vectors(count: int) -> tuple[torch.Tensor, ...]:
        return tuple(empty(width, dtype=dtype) for _ in range(count))

    def scales(*sizes: int) -> tuple[torch.Tensor | None, ...]:
        return tuple(empty(n) if int8 else None for n in sizes)

    own = vectors(8)
    return BlockWeights(
        heads=width // size,
        eps=(1e-5,) * 3,
        ln1=vectors(2),  # type: ignore[arg-type]
        ln2=vectors(2),  # type: ignore[arg-type]
        channel=(*vectors(1), matrix(inner, width), matrix(width, inner)),  # type: ignore[arg-type]
        channel_scales=scales(inner, width),
        mixes=vectors(6),
        matrices=tuple(matrix(width, width) for _ in range(4)),
        scales=scales(*[width] * 4),
        down=tuple(_unless(first, i, width, rank, dtype) for i, rank in enumerate(RANKS)),
        up=tuple(_unless(first, i, rank, width, dtype) for i, rank in enumerate(RANKS)),
        vectors=(*own[:2], None if first else own[2], *own[3:]),
    )


def _unless(
    first: bool, i: int, rows: int, columns: int, dtype: torch.dtype
) -> torch.Tensor | None:
    return None if first and i == 2 else empty(rows, columns, dtype=dtype)


def memory(dtype: torch.dtype, rows: int, width: int, size: int) -> Memory:
    """Of an RWKV-7 block."""
    shifts = [empty(rows, width, dtype=dtype) for _ in range(2)]
    return Memory(shifts[0], empty(rows, width // size, size, size), shifts[1], None)


def attention(weights: BlockWeights, kv: int, conv: int) -> BlockWeights:
    """The same as an attention block with so many channels of keys, and taps of a convolution."""
    query, key, value, output = weights.matrices
    assert key is not None
    assert value is not None
    scales = tuple(
        None if x is None else x[:n]
        for x, n in zip(weights.scales, (None, kv, kv, None), strict=True)
    )
    return weights._replace(
        mixes=(None,) * 6,
        matrices=(query, key[:kv], value[:kv], output),
        scales=scales,
        down=(None,) * 4,
        up=(None,) * 4,
        vectors=(None,) * 8,
        conv=(empty(conv, kv, dtype=weights.ln1[0].dtype) if conv else None,),
    )


def attended(
    dtype: torch.dtype,
    rows: int,
    weights: BlockWeights,
    chunk: int,
    topk: int,
    chunks: int = 64,
    coarse: bool = False,
) -> Memory:
    """Of an attention block, one that selects coarse to fine."""
    size, kv = weights.size, weights.kv_width
    k = empty(rows, kv // size, chunks * chunk, size, dtype=dtype)
    taps = weights.conv[0]
    conv = None if taps is None else empty(rows, len(taps) - 1, kv, dtype=dtype)
    means = empty(rows, kv // size, chunks, size)
    lengths = empty(rows, dtype=torch.int64)
    forest = room_for(means.flatten(0, 1)).tensors() if coarse else []
    cache = Cache(k, k, means, lengths, topk, conv, conv, forest)
    return Memory(None, None, empty(rows, len(weights.ln1[0]), dtype=dtype), cache)


def case(
    dtype: torch.dtype, rows: int, width: int, size: int, int8: bool = False, quick: bool = False
) -> Case:
    def call() -> None:
        x = empty(rows, width)
        for first in (True, False):
            own = weights(dtype, width, size, first, int8)
            read_block(x, x, own, memory(dtype, rows, width, size))
        for kv, conv, chunk, topk in ((width, 0, 2048, 3), (2 * size, 4, 128, 9), (size, 1, 16, 1)):
            sparse = attention(own, kv, conv)
            read_block(x, x, sparse, attended(dtype, rows, sparse, chunk, topk))
            if topk > 1:
                read_block(x, x, sparse, attended(dtype, rows, sparse, chunk, topk, MANY, True))
        norm = Norm(*own.ln1, 1e-5)
        embed(empty(rows, dtype=torch.int64), empty(65536, width, dtype=dtype), norm)
        head = empty(65536, width, dtype=torch.int8 if int8 else dtype)
        logits(x, norm, head, empty(65536) if int8 else None, dtype)

    words = f"{dtype}, int8 {int8}, rows {rows}, C {width}, N {size}"
    return Case(words.replace("torch.", ""), call, quick)


CASES = [case(torch.bfloat16, n, 768, 64, quick=True) for n in (1, 32)]
CASES += [case(torch.bfloat16, n, 2048, 64, int8) for n in (1, 16) for int8 in (False, True)]
CASES += [case(d, n, 768, 64) for d in (torch.float16, torch.float32) for n in (1, 16, 64)]
CASES += [case(torch.bfloat16, n, 240, 40) for n in (1, 16)]
CASES += [case(torch.float32, n, 1024, 128, int8) for n in (1, 64) for int8 in (False, True)]
