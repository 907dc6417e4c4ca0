"""The exceptions for what a user can mend, and how they read: one line that fits a terminal."""

__all__ = ["LONGEST_LINE", "InputError", "WriteError", "is_out_of_memory", "one_line", "shown"]

LONGEST_LINE = 300  # characters of a message


class InputError(ValueError):
    """A mistake in what the user gave: a value, a file, a length, a combination of options.

    The message is one complete sentence that names the offending value and says what would be
    accepted. The command line prints it as ``error: <message>`` and exits with status 1. Whatever
    it quotes, it is one line of printable characters, `LONGEST_LINE` of them at most.
    """

    def __init__(self, message: object) -> None:
        super().__init__(one_line(str(message)))


class WriteError(OSError, InputError):
    """A file that could not be written; the old one, if there was one, is as it was.

    An `InputError` for whoever shows it, an `OSError` for whoever makes room and goes on.
    """

    def __init__(self, message: object) -> None:
        InputError.__init__(self, message)


def one_line(text: str, longest: int = LONGEST_LINE) -> str:
    """`text` in one line: control characters escaped, and the middle left out where it is long."""
    line = " ".join(text.split())
    if not line.isprintable():
        line = "".join(x if x.isprintable() else _escaped(x) for x in line)
    if len(line) <= longest:
        return line
    end = longest // 3
    return f"{line[: longest - end - 3]} … {line[-end:]}"


def shown(value: object, longest: int = 60) -> str:
    """`value` as a message quotes it: its repr, shortened."""
    if isinstance(value, int) and value.bit_length() > 200:  # beyond 4300 digits repr() refuses
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, str | bytes):
        value = value[: 4 * longest]
    try:
        return one_line(repr(value), longest)
    except (RecursionError, ValueError):
        return f"a {type(value).__name__}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    phrases = ("out of memory", "not enough memory", "can't allocate memory")
    text = str(error).lower() if isinstance(error, RuntimeError) else ""
    return any(phrase in text for phrase in phrases)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")
