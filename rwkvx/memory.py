"""Whether this machine has the memory that something will take, said before it is asked for."""

import os

from rwkvx.errors import InputError

__all__ = ["check_room"]


def check_room(needed: float, what: str) -> None:
    """Refuse what takes more bytes than this machine has, used or not.

    Raises:
        InputError: it does; `what` begins the sentence.
    """
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise InputError(
            f"{what} takes {needed / 1e9:,.0f} GB, this machine has {there / 1e9:,.0f} GB of memory"
        )
