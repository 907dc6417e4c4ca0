# mypy: allow-untyped-defs, allow-incomplete-defs
"""One token of each row of a batch through a block: five launches, seven where it attends.

Everything is changed in place, nothing is looked at: a CUDA graph holds it. Axes: B rows of the
batch, C width, H heads, D head size, G key/value heads, O outputs.
"""

from torch import Tensor

from rwkvx_kernels.one_token.common import BlockWeights, Memory
from rwkvx_kernels.one_token.triton_heads import mix_heads
from rwkvx_kernels.one_token.triton_products import Matrix, Norm, add_product, read_token


def read_block(x: Tensor, v_first: Tensor, weights: BlockWeights, memory: Memory) -> None:
    """As `api.read_block`."""
    if weights.mixes[0] is None:
        raise NotImplementedError
    _time_mix(x, v_first, weights, memory)
    x_k, key, value = weights.channel
    key_scale, value_scale = weights.channel_scales
    norm = Norm(*weights.ln2, weights.eps[1])
    keys = [Matrix(key, key_scale, x_k)]
    (hidden,), _, now = read_token(x, memory.ffn_shift, norm, keys, [], squared=True)
    add_product(x, hidden, Matrix(value, value_scale), now, memory.ffn_shift)


def _time_mix(x: Tensor, v_first: Tensor, weights: BlockWeights, memory: Memory) -> None:
    assert memory.shift is not None
    assert memory.matrix is not None
    r, w, k, v, a, g = weights.mixes
    own = zip(weights.matrices[:3], weights.scales[:3], (r, k, v), strict=True)
    factors = list(zip(weights.down, (w, a, v, g), strict=True))
    norm = Norm(*weights.ln1, weights.eps[0])
    matrices = [Matrix(*each) for each in own]
    read, low, now = read_token(x, memory.shift, norm, matrices, factors)
    # The three lie one after the other.
    y = mix_heads(read[0], low, now, weights, v_first, memory.matrix, memory.shift)
    add_product(x, y, Matrix(weights.matrices[3], weights.scales[3]))

