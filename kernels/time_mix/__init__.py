"""What RWKV-7's time mix does between its projections."""

from rwkvx_kernels.time_mix.api import time_mix, time_mix_summary
from rwkvx_kernels.time_mix.common import LOG_DECAY_SCALE, TimeMixWeights

__all__ = ["LOG_DECAY_SCALE", "TimeMixWeights", "time_mix", "time_mix_summary"]
