"""Launch options of the Triton kernels of WKV7 (`tools/triton_options.py`).

Stages: "segment" (outputs), "summary", "follow", "carry" (the gradient of the state) and
"gradients". Rows are tokens of a chunk: the recurrent stages have 16, the rows of a tensor core;
what is kept for the backward pass is one state for the rows of "gradients". Columns are value
channels of a program, at most; in "gradients" they are fixed. "gradients" and "carry" spill
with Triton 3.6 and 3.9 on sm_90, and are faster so than without; the others do not, for bfloat16
and heads of 64 (packed sequences: up to 10 numbers in "segment" and "summary"). In "gradients"
eight warps are wrong on an H200: with tiles of 16 channels, and where products of bfloat16 stand
beside those of tf32.
"""

from rwkvx_kernels.tools.triton_options import Options, Row

STAGES = ("segment", "summary", "follow", "carry", "gradients")

TABLE = (
    Row("segment", Options(16, 64, 4, 3), bytes=2, size=64),
    Row("segment", Options(16, 16, 4, 1), bytes=4, size=128),
    Row("summary", Options(16, 64, 4, 3), bytes=2, size=64),
    Row("summary", Options(16, 16, 8, 1), bytes=4, size=128),
    Row("follow", Options(0, 32, 4, 1), bytes=4, size=64),
    Row("follow", Options(0, 16, 8, 1), bytes=4, size=128),
    Row("carry", Options(16, 64, 4, 3), bytes=2, size=64),
    Row("carry", Options(16, 32, 8, 1), bytes=4, size=128),
    Row("gradients", Options(64, 32, 4, 1), bytes=2, size=64),
    Row("gradients", Options(16, 32, 4, 1), bytes=4, size=128),
)
