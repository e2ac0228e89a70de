"""What the commands share: option types, and where log lines go."""

import logging
import os
import warnings
from pathlib import Path
from typing import Annotated, Literal

import typer

Sources = Annotated[list[Path], typer.Argument(help="source folders: SHARDS/<source>")]
Target = Annotated[Path, typer.Option(help="folder to make")]
Precision = Annotated[Literal["fp32", "bf16"], typer.Option(help="of the computation")]
DeviceChoice = Annotated[Literal["auto", "cpu", "gpu"], typer.Option(help="where to compute")]


def log_to_console() -> None:
    """Our own log lines on rank 0, warnings of every rank; libraries only from warnings up."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("megamm").setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    warnings.simplefilter("ignore")
