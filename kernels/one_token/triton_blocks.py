# mypy: allow-untyped-defs, allow-incomplete-defs
"""One token of each row of a batch through a block: five launches, seven where it attends.

Everything is changed in place, nothing is looked at: a CUDA graph holds it. Axes: B rows of the
batch, C width, H heads, D head size, G key/value heads, O outputs.
"""

from torch import Tensor

from rwkvx_kernels.chunk_attention.triton_decode import decode
from rwkvx_kernels.chunk_select.api import slots_of
from rwkvx_kernels.chunk_select.triton_decode import descend_rows, kept_of_split, select_rows
from rwkvx_kernels.one_token.common import BlockWeights, Cache, Memory
from rwkvx_kernels.one_token.triton_heads import mix_heads
from rwkvx_kernels.one_token.triton_places import place
from rwkvx_kernels.one_token.triton_products import Matrix, add_product, read_token
from rwkvx_kernels.token_shift import Norm

# What splits keep is joined by every program that attends, if they keep so few chunks each.
MOST_JOINED = 32


def read_block(x: Tensor, v_first: Tensor, weights: BlockWeights, memory: Memory) -> None:
    """As `api.read_block`."""
    if memory.cache is None:
        y = _time_mix(x, v_first, weights, memory)
    else:
        y = _attention(x, weights, memory.cache)
    add_product(x, y, _matrix(weights, 3))
    x_k, key, value = weights.channel
    key_scale, value_scale = weights.channel_scales
    norm = Norm(*weights.ln2, weights.eps[1])
    keys = [Matrix(key, key_scale, x_k)]
    (hidden,), _, now = read_token(x, memory.ffn_shift, norm, keys, [], squared=True)
    add_product(x, hidden, Matrix(value, value_scale), now, memory.ffn_shift)


def _time_mix(x: Tensor, v_first: Tensor, weights: BlockWeights, memory: Memory) -> Tensor:
    """What the output projection reads: two launches."""
    assert memory.shift is not None
    assert memory.matrix is not None
    r, w, k, v, a, g = weights.mixes
    factors = list(zip(weights.down, (w, a, v, g), strict=True))
    matrices = [_matrix(weights, i, mix) for i, mix in enumerate((r, k, v))]
    norm = Norm(*weights.ln1, weights.eps[0])
    read, low, now = read_token(x, memory.shift, norm, matrices, factors)
    assert low is not None
    # r, k and v lie one after the other.
    return mix_heads(read[0], low, now, weights, v_first, memory.matrix, memory.shift)


def _attention(x: Tensor, weights: BlockWeights, cache: Cache) -> Tensor:
    """The same: four launches; one more for each level of a tree, some for long lists of chunks."""
    norm = Norm(*weights.ln1, weights.eps[0])
    (q, k, v), *_ = read_token(x, None, norm, [_matrix(weights, i) for i in range(3)], [])
    q = q.view(len(x), 1, weights.heads, weights.size)
    chunks, lengths = cache.means.shape[2], cache.position
    assert isinstance(lengths, Tensor)
    size = cache.k.shape[2] // chunks
    slots = slots_of(cache.topk, chunks, "triton")
    past = (q, cache.means, cache.forest, lengths, size, slots + 1)
    if kept_of_split(slots) <= MOST_JOINED:
        chosen = place(q, k, v, weights, cache, slots)
        if chosen is not None:
            chosen = descend_rows(*past, counted=False, above=chosen)
    else:
        place(q, k, v, weights, cache, 0)
        chosen = select_rows(*past, counted=False)
    y = decode(q, cache.k, cache.v, chosen, lengths, size, slots + 1, counted=False)
    return y.view(len(x), -1)


def _matrix(weights: BlockWeights, i: int, mix: Tensor | None = None) -> Matrix:
    """The i-th of r, k, v and the output projection."""
    weight = weights.matrices[i]
    assert weight is not None
    return Matrix(weight, weights.scales[i], mix)
