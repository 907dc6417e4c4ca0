"""Launch options of the Triton kernels of chunk attention (`tools/triton_options.py`).

Stages: "pairs" and "own" forward; "pairs_dq", "own_dq" and "keys" (gradients of keys and values)
backward; "decode". Rows are pairs or queries, columns keys; where a chunk has no more keys than
columns, it is attended in one step. "own" and "own_dq" work on squares: rows count. Chosen by
what an H200 took, of those that do not spill on sm_90 with Triton 3.6 and 3.9 ("own": 2 numbers
with 3.9; docs/results/ahead_of_time.md).
"""

from rwkvx_kernels.tools.triton_options import Options, Row

STAGES = ("pairs", "own", "pairs_dq", "own_dq", "keys", "decode")
HOPPER = ("sm_90", "sm_100", "sm_103")

TABLE = (
    Row("pairs", Options(64, 128, 4, 1), HOPPER, bytes=2, size=64),
    Row("pairs", Options(64, 64, 4, 2), bytes=2, size=128),
    Row("pairs", Options(32, 32, 4, 1), bytes=4, size=64),
    Row("pairs", Options(16, 16, 4, 1), bytes=4, size=128),
    Row("own", Options(64, 64, 4, 1), bytes=2, size=64),
    Row("own", Options(64, 64, 8, 2), bytes=2, size=128),
    Row("own", Options(16, 16, 4, 1), bytes=4, size=64),
    Row("own", Options(16, 16, 8, 1), bytes=4, size=128),
    Row("pairs_dq", Options(64, 128, 4, 1), HOPPER, bytes=2, size=64),
    Row("pairs_dq", Options(64, 64, 4, 1), bytes=2, size=128),
    Row("pairs_dq", Options(32, 32, 8, 1), bytes=4, size=64),
    Row("pairs_dq", Options(16, 16, 4, 1), bytes=4, size=128),
    Row("own_dq", Options(64, 64, 4, 2), bytes=2, size=64),
    Row("own_dq", Options(32, 32, 4, 1), bytes=2, size=128),
    Row("own_dq", Options(32, 32, 8, 1), bytes=4, size=64),
    Row("own_dq", Options(16, 16, 8, 1), bytes=4, size=128),
    Row("keys", Options(64, 64, 4, 1), HOPPER, bytes=2, size=64),
    Row("keys", Options(16, 64, 8, 1), bytes=2, size=128),
    Row("keys", Options(16, 32, 8, 1), bytes=4, size=64),
    Row("keys", Options(16, 16, 8, 1), bytes=4, size=128),
    Row("decode", Options(1, 128, 4, 2)),
)
