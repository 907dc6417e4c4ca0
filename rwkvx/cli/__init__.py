"""The command line: ``rwkvx COMMAND``. The one place in `rwkvx` that may reach `rwkvx_evals`.

Commands are loaded when they run, so that ``rwkvx --help`` answers at once.
"""

from rwkvx.cli.main import cli, main

__all__ = ["cli", "main"]
