"""Memory settings of the process, for tensors that come and go by the megabyte."""

import ctypes

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
