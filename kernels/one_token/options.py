"""Launch options of the Triton kernels of one token (`tools/triton_options.py`).

Stages: "token", products with the vector of one row, which are sums along it, and "tokens", with
those of several, on tensor cores; "factors" of a low rank; "heads". Rows are outputs of a program,
columns the inputs that it reads at once. Chosen such that nothing of the 0.22B shape spills on
sm_90, with Triton 3.6 and 3.9 (docs/results/ahead_of_time.md has what else does), and that a width
of 768 makes some programs for each of its multiprocessors.
"""

from rwkvx_kernels.tools.triton_options import Options, Row

STAGES = ("token", "tokens", "factors", "heads")
# Rows of a batch that are read beside one another; more take turns, and read weights again.
MOST_ROWS = 32
# Largest head: its state stands in registers.
MOST_SIZE = 128

TABLE = (
    Row("token", Options(4, 1024, 4, 1)),
    Row("tokens", Options(16, 64, 4, 2)),
    Row("factors", Options(16, 256, 4, 1)),
    Row("heads", Options(1, 32, 4, 1), size=64),
    Row("heads", Options(1, 32, 8, 1)),
)
