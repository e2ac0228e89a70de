"""Shared parts of the commands: option types and tables."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from megamm.common import outputs

if TYPE_CHECKING:
    from rich.table import Table

Sources = Annotated[list[Path], typer.Argument(help="source folders: SHARDS/<source>")]


def writable_folder(parameter: typer.CallbackParam, folder: Path) -> Path:
    """Callback of an option or argument: check that the folder can be written to, before any work."""
    outputs.check_folder(folder, _name(parameter))
    return folder


def writable_file(parameter: typer.CallbackParam, file: Path | None) -> Path | None:
    """The same for a file, or a folder of files that does not exist yet; the command refuses an existing folder."""
    if file is not None and not file.is_dir():
        outputs.check_file(file, _name(parameter))
    return file


def _name(parameter: typer.CallbackParam) -> str:
    return next(iter(parameter.opts), parameter.name or "") if parameter.param_type_name == "option" else "OUT"


Target = Annotated[Path, typer.Option(help="folder to create", callback=writable_folder)]
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
