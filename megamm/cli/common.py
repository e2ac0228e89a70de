"""What the commands share: option types, and where log lines go."""

import logging
import os
import warnings
from pathlib import Path
from typing import Annotated, Literal

import typer

Sources = Annotated[list[Path], typer.Argument(help="source folders: SHARDS/<source>")]
DeviceChoice = Annotated[Literal["auto", "cpu", "gpu"], typer.Option(help="where to compute")]


def log_to_console() -> None:
    """Our own log lines on rank 0, warnings of every rank; libraries only from warnings up."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("megamm").setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    warnings.simplefilter("ignore")
