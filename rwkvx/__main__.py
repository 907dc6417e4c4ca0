"""``python -m rwkvx``: the command line."""

from rwkvx.cli import main

if __name__ == "__main__":
    main()
