"""Shared parts of the commands: option types and tables."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from rich.table import Table

Sources = Annotated[list[Path], typer.Argument(help="source folders: SHARDS/<source>")]
Target = Annotated[Path, typer.Option(help="folder to create")]
Precision = Annotated[Literal["fp32", "bf16"], typer.Option(help="dtype of the computation")]
DeviceChoice = Annotated[Literal["auto", "cpu", "gpu"], typer.Option(help="device to compute on")]


def print_tables(*tables: "Table") -> None:
    """Print tables for the width of the terminal; a file gets all columns in full, without trailing blanks."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=1000, no_color=True)
    for table in tables:
        with console.capture() as text:
            console.print(table)
        lines = text.get().splitlines()
        print("\n".join(line if console.is_terminal else line.rstrip() for line in lines))
