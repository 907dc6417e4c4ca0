"""Launch options of the Triton kernels of the squared ReLU (`tools/triton_options.py`).

Stages: "forward" and "backward". A program has rows times columns elements.
"""

from rwkvx_kernels.tools.triton_options import ANY_SIZE, Options, Row

STAGES = ("forward", "backward")

TABLE = tuple(Row(stage, Options(1, 2048, 4, 3), size=ANY_SIZE) for stage in STAGES)
