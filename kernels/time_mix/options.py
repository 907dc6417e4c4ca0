"""Launch options of the Triton kernels of the time mix (`tools/triton_options.py`).

Stages: "keys" and "finish", before and after the recurrence, with their gradients, and "step", a
few tokens at once. Rows are tokens of one head; columns are how many times as many a program of
gradients reads, one after the other. Of "step" only warps and stages count.
"""

from rwkvx_kernels.tools.triton_options import Options, Row

STAGES = ("keys", "keys_gradients", "finish", "finish_gradients", "step")

TABLE = (
    *(Row(x, Options(128, 1, 4, 3), size=16) for x in ("keys", "finish")),
    *(Row(x, Options(64, 1, 4, 3), size=32) for x in ("keys", "finish")),
    *(Row(x, Options(32, 1, 4, 3), size=64) for x in ("keys", "finish")),
    *(Row(x, Options(16, 1, 4, 3), size=128) for x in ("keys", "finish")),
    *(Row(x, Options(64, 4, 4, 3), size=16) for x in ("keys_gradients", "finish_gradients")),
    *(Row(x, Options(32, 4, 4, 3), size=32) for x in ("keys_gradients", "finish_gradients")),
    *(Row(x, Options(16, 4, 4, 3), size=64) for x in ("keys_gradients", "finish_gradients")),
    *(Row(x, Options(8, 4, 4, 3), size=128) for x in ("keys_gradients", "finish_gradients")),
    Row("step", Options(1, 1, 1, 3), size=16),
    Row("step", Options(1, 1, 2, 3), size=32),
    Row("step", Options(1, 1, 4, 3), size=64),
    Row("step", Options(1, 1, 8, 3), size=128),
)
