"""What the commands share: option types, and where log lines and tables go."""

import logging
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from rich.table import Table

Sources = Annotated[list[Path], typer.Argument(help="source folders: SHARDS/<source>")]
Target = Annotated[Path, typer.Option(help="folder to make")]
Precision = Annotated[Literal["fp32", "bf16"], typer.Option(help="of the computation")]
DeviceChoice = Annotated[Literal["auto", "cpu", "gpu"], typer.Option(help="where to compute")]


def print_tables(*tables: "Table") -> None:
    """For the width of a terminal; a file gets all of every column, and no blanks at the ends of lines."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=1000, no_color=True)
    for table in tables:
        with console.capture() as text:
            console.print(table)
        lines = text.get().splitlines()
        print("\n".join(line if console.is_terminal else line.rstrip() for line in lines))


def log_to_console() -> None:
    """Our own log lines on rank 0, warnings of every rank; libraries only from warnings up."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("megamm").setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    warnings.simplefilter("ignore")
