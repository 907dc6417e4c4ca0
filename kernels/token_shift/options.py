"""Launch options of the Triton kernels of the token shift (`tools/triton_options.py`).

Stages: "forward" and "backward", whose rows are tokens and columns channels of a program; with the
layer norm before them "norm_forward" and "norm_backward", whose programs have all channels (sizes
are widths) of at most rows tokens, one after the other, and no columns. Chosen such that nothing
spills on sm_90, with Triton 3.6 and 3.9: at most four channels a thread. Past 2,048 the gradients
of six mixes do with 16 warps (docs/results/ahead_of_time.md): wider tokens are normed by torch.
"""

from rwkvx_kernels.tools.triton_options import ANY_SIZE, Options, Row

STAGES = ("forward", "backward")
NORM_STAGES = ("norm_forward", "norm_backward")

TABLE = (
    *(Row(stage, Options(16, 128, 4, 3), size=ANY_SIZE) for stage in STAGES),
    *(Row(stage, Options(32, 1, 4, 1), size=256) for stage in NORM_STAGES),
    *(Row(stage, Options(32, 1, 8, 1), size=1024) for stage in NORM_STAGES),
    *(Row(stage, Options(32, 1, 16, 1), size=2048) for stage in NORM_STAGES),
)
