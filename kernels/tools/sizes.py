"""Sizes of grids and tiles, on the host.

Triton's own `cdiv` and `next_power_of_2` are functions of its compiler, and take 10 us a call.
"""


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up; both at least 0, b not 0."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is n or more; 0 for 0."""
    return 1 << (n - 1).bit_length() if n > 0 else 0
