"""Log lines on the console, the same for commands and ranks."""

import logging
import os
import warnings


def log_to_console() -> None:
    """Log megamm's lines on rank 0 and its warnings on every rank; from libraries, only warnings and errors."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("megamm").setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    warnings.simplefilter("ignore")
