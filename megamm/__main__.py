"""`python -m megamm` is the `megamm` command (torchrun starts it this way)."""

from megamm.cli import main

if __name__ == "__main__":
    main()
