"""`python -m rwkvx`: the command line, as `torchrun -m rwkvx` starts it."""

from rwkvx.cli import main

if __name__ == "__main__":
    main()
