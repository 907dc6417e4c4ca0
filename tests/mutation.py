"""Inputs changed at random: bytes, and values that programs stumble over. The same for a seed."""

import random

WORDS = [
    b"", b"\0", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\x80\x02", b"PK\x03\x04", b"\n", b"\r\n",
    b"-1", b"0", b"1e999", b"NaN", b"-0.0", b"null", b"true", b"99999999999999999999", b"9" * 5000,
    b"18446744073709551616", b"[", b"]", b"{", b"}", b"[" * 2000, b'"', b"'", b",", b":", b": ",
    b"- ", b"&a", b"*a", b"<<: ", b"!!int ", b"!!binary ", b"2000-99-99", b"../", b"/dev/zero",
    b"~x/",    b"\xed\xa0\x80", b"\xe2\x80\xae", b"\x1b[31m", b"A" * 1000,
]  # fmt: skip
NUMBERS = [0, 1, 127, 128, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]


def mutated(content: bytes, draw: random.Random, head: int = 3000) -> bytes:
    """One to four changes, mostly within `head` bytes of either end, where the structure is."""
    data = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 4])):
        near = min(head, len(data))
        places = (
            draw.randint(0, near),
            len(data) - draw.randint(0, near),
            draw.randint(0, len(data)),
        )
        at = draw.choice(places)
        change = draw.randrange(8)
        if change == 0:
            data = data[:at]
        elif change == 1:
            data[at : at + draw.randint(1, 40)] = b""
        elif change == 2:
            data[at:at] = data[at : at + draw.randint(1, 200)]
        elif change == 3:
            data[at : at + draw.choice([0, 1, 4, 8])] = draw.choice(WORDS)
        elif change == 4:
            size = draw.choice([1, 2, 4, 8])
            number = draw.choice(NUMBERS) % 256**size
            data[at : at + size] = number.to_bytes(size, draw.choice(["little", "big"]))
        elif data:
            data[min(at, len(data) - 1)] ^= draw.randrange(1, 256)
    return bytes(data)


# Arguments of options. Small ones may be taken; none of them is to end in a traceback.
ARGUMENTS = [
    "", " ", "0", "1", "2", "-1", "1.5", "1e-45", "1e-320", "1e308", "1e999", "nan", "inf", "-inf",
    "null", "true", "18446744073709551616", "9223372036854775807", "1" + "0" * 30, "9" * 6000,
    "0x10", "1_0", "٣", "½", "a", "x" * 5000, "\udcff\udcfe", "\n", "a\nb", "\x1b[31m",
    "~nobody-here/x", "/dev/null", "/dev/zero", "/proc", ".", "/dev/null/at/all", "/proc/self/mem",
    "[", "{", "*a", "&a [*a]", "[" * 500, "{a: 1}", "[1, 2", "a: b: c", "meta", "cuda:99", "cpu:7",
    "mkldnn", "float8", "1k", "1m", "0k", "4x", "1k,,2k", ",", "1k,99999999999999999m", "-", "--",
    "-x", "--help", "=", "%s", "{}", "$(x)", "*", "\u202eabc",
]  # fmt: skip
