"""Launch options of the Triton kernels beside the products (`tools/triton_options.py`).

Stage: "entropy", losses and gradients of logits. A program has one token; columns are logits that
it reads at once, at most.
"""

from rwkvx_kernels.tools.triton_options import ANY_SIZE, Options, Row

STAGES = ("entropy",)

TABLE = (Row("entropy", Options(1, 8192, 8, 3), size=ANY_SIZE),)
