"""The one exception class for what a user can mend."""

__all__ = ["InputError"]


class InputError(ValueError):
    """A mistake in what the user gave: a value, a file, a length, a combination of options.

    The message is one complete sentence that names the offending value and says what would be
    accepted. The command line prints it as ``error: <message>`` and exits with status 1.
    """
