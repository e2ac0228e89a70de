"""The `megamm` command: one sub-command per stage of a run; each only parses and calls.

Imports are inside the commands, so that `megamm --help` and a config error cost no torch import.
A UserError becomes one line on stderr and exit code 2.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from megamm.errors import UserError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
data_app = typer.Typer(no_args_is_help=True, help="Fetch public data, build shards, cache tokens.")
tokenizer_app = typer.Typer(no_args_is_help=True, help="Train the tokenizers (codecs) of the modalities.")
convert_app = typer.Typer(no_args_is_help=True, help="Export to and import from Hugging Face folders.")
app.add_typer(data_app, name="data")
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(convert_app, name="convert")


def main() -> None:
    """Entry point of the console script and of `python -m megamm`."""
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
