"""Launch options of the Triton kernels of chunk selection (`tools/triton_options.py`).

Stages: "means" of chunks; "few" and "many", the best of a stream, lists of up to `FEW` and up to
`MANY`; "children", the scores of kept nodes' children. Rows are queries, or pairs of a query and a
node; columns are candidates; for "means" rows are keys. Chosen such that nothing spills on sm_90,
with Triton 3.6 and 3.9 (docs/results/ahead_of_time.md).
"""

from rwkvx_kernels.tools.triton_options import Options, Row

# Lists in registers: longer ones are made in several passes.
FEW, MANY = 8, 16
HOPPER = ("sm_90", "sm_100", "sm_103")

TABLE = (
    Row("means", Options(64, 1, 4, 1)),
    Row("few", Options(128, 64, 4, 2), HOPPER, bytes=2, size=64),
    Row("few", Options(64, 64, 4, 2), bytes=2),
    Row("few", Options(64, 32, 4, 1)),
    Row("many", Options(64, 64, 4, 2), HOPPER, bytes=2, size=64),
    Row("many", Options(32, 32, 4, 1)),
    Row("children", Options(128, 32, 4, 2), HOPPER, bytes=2, size=64),
    Row("children", Options(64, 32, 4, 1)),
)
