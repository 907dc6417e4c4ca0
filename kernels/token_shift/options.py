"""Launch options of the Triton kernels of the token shift (`tools/triton_options.py`).

Stages: "forward" and "backward". Rows are tokens, columns channels of a program.
"""

from rwkvx_kernels.tools.triton_options import ANY_SIZE, Options, Row

STAGES = ("forward", "backward")

TABLE = tuple(Row(stage, Options(16, 128, 4, 3), size=ANY_SIZE) for stage in STAGES)
