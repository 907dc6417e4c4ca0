"""Launch options of the Triton kernels of chunk selection (`tools/triton_options.py`).

Stages: "means" of chunks; "flat", the best of all chunks, and "level", those of a level of a
descent; "children", the scores of kept nodes' children; "keep", the best nodes of a level. Rows are
queries, or pairs of a query and a node; columns are candidates; for "means" rows are keys, for
"keep" scores. Chosen such that nothing spills on sm_90,
with Triton 3.6 and 3.9 (docs/results/ahead_of_time.md).
"""

from rwkvx_kernels.tools.triton_options import Options, Row

# What a list in registers holds at most: longer ones are made in several passes.
MOST_KEPT = 8
STAGES = ("means", "flat", "level", "children", "keep")
HOPPER = ("sm_90", "sm_100", "sm_103")

TABLE = (
    Row("means", Options(64, 1, 4, 1)),
    Row("flat", Options(128, 64, 4, 2), HOPPER, bytes=2, size=64),
    Row("flat", Options(64, 32, 4, 1), size=64),
    Row("flat", Options(64, 32, 8, 1)),
    Row("level", Options(64, 64, 8, 1), bytes=2, size=64),
    Row("level", Options(64, 32, 8, 1), size=64),
    Row("level", Options(64, 32, 8, 1), bytes=2),
    Row("level", Options(64, 16, 8, 1)),
    Row("children", Options(128, 32, 4, 2), HOPPER, bytes=2, size=64),
    Row("children", Options(64, 32, 4, 1)),
    Row("keep", Options(2048, 0, 4, 1)),
)
