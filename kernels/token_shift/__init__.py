"""Every token mixed with the one before it, after a layer norm where one is given."""

from rwkvx_kernels.token_shift.api import fuses_norm, token_shift
from rwkvx_kernels.token_shift.common import Norm

__all__ = ["Norm", "fuses_norm", "token_shift"]
