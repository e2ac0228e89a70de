"""The `megamm` command and `python -m megamm` (torchrun starts it this way), on a Python that megamm supports."""

import sys

SUPPORTED = ((3, 11), (3, 12))
"""Supported versions of Python; setup.py has the same range."""


def main() -> None:
    """Run the command; on an unsupported Python print one line and exit with code 2."""
    if sys.version_info[:2] not in SUPPORTED:
        found = f"{'.'.join(map(str, sys.version_info[:3]))} ({sys.executable})"
        print(
            f"error: megamm needs Python 3.11 or 3.12, not {found}: install it in another environment", file=sys.stderr
        )
        sys.exit(2)
    # Imported here: on another Python it could fail with a SyntaxError or a missing package.
    from megamm import cli

    cli.main()


if __name__ == "__main__":
    main()
