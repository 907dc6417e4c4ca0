"""Settings of the process: memory for tensors that come and go by the megabyte, waiting threads."""

import ctypes
import os

# Turns of a waiting thread's loop, some tens of microseconds: longer than what lies between two
# loops of a block, shorter than what matters to whoever else wants the core.
_SPINS = "10000"

# From malloc.h of glibc.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> None:
    """Let glibc keep freed memory instead of giving it back to the kernel with every tensor.

    Otherwise each large activation is made of new pages that the kernel must clear first: a
    training step of passkey-tiny took twice the page faults and an eighth more time. No effect
    elsewhere.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # no glibc
        return
    mallopt(_MMAP_THRESHOLD, 32 << 20)
    mallopt(_TRIM_THRESHOLD, 2_000_000_000)
    mallopt(_TOP_PAD, 64 << 20)


def wait_briefly() -> None:
    """Let idle threads of GNU OpenMP sleep soon; call it before torch is imported.

    By default they spin for milliseconds, on a core that the threads of compiled loops want (torch
    and Numba bring a pool each): the recurrence took half as long again. Not spinning at all
    (OMP_WAIT_POLICY=passive) costs a decoded token a fifth. What the user has set is kept.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
