"""Whether this machine has the memory that something will take, said before it is asked for."""

import os
import re
from contextlib import suppress
from pathlib import Path

from rwkvx.errors import InputError

__all__ = ["check_room", "free_memory"]


def check_room(needed: float, what: str) -> None:
    """Refuse what takes more bytes than this machine has free: the system would end the process.

    Raises:
        InputError: it does; `what` begins the sentence.
    """
    if needed > (free := free_memory()):
        raise InputError(
            f"{what} takes {needed / 1e9:,.1f} GB, this machine has {free / 1e9:,.1f} GB of memory "
            "free"
        )


def free_memory() -> int:
    """Bytes that may be asked for: what the system could free at once, within a container's limit.

    All of the machine's memory where the system does not say.
    """
    rooms = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with suppress(OSError, TypeError):
        text = Path("/proc/meminfo").read_text()
        rooms.append(1024 * int(re.search(r"MemAvailable:\s+(\d+)", text)[1]))  # type: ignore[index]
    with suppress(OSError, ValueError):  # "max" where there is no limit
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{x}").read_text()) for x in ("max", "current"))
        rooms.append(limit - used)
    return max(0, min(rooms))
