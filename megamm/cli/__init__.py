"""The `megamm` command: one sub-command per stage of a run; each only parses and calls.

Imports are inside the commands, so that `megamm --help` and a config error cost no torch import.
A UserError becomes one line on stderr and exit code 2.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
import yaml
from pydantic import BaseModel

from megamm.cli import data, tokenizer, use
from megamm.cli.common import log_to_console
from megamm.errors import UserError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
app.add_typer(data.app, name="data")
app.add_typer(tokenizer.app, name="tokenizer")
app.add_typer(use.app)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file of the run")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example train.steps=100")] = None,
    nproc: Annotated[int, typer.Option(help="start that many local processes")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the resolved run, check it and stop")] = False,
    world_size: Annotated[int | None, typer.Option(help="dry run: of a job of that many ranks", min=1)] = None,
    vocabulary_size: Annotated[int | None, typer.Option(help="dry run: needs no data then", min=1)] = None,
    rank: Annotated[int | None, typer.Option(help="dry run: print the place of this rank too")] = None,
) -> None:
    """Train, or resume from the newest valid checkpoint in the run's output folder."""
    from megamm import launch, layout
    from megamm.config import load_config

    run = load_config(config, overrides or [])
    if dry_run:
        from megamm.dry_run import report

        text, inconsistent = report(run, world_size or nproc, vocabulary_size, rank)
        print(yaml_of(run), text, sep="\n")
        if inconsistent:
            print(f"inconsistent: {inconsistent}", file=sys.stderr)
            raise typer.Exit(1)
        return
    if (world_size, vocabulary_size, rank) != (None, None, None):
        raise UserError("--world-size, --vocabulary-size and --rank are for --dry-run", remedy="add --dry-run")
    if not launch.is_rank():
        # Everything that can be refused is refused here, before a process starts.
        layout.check(run, nproc)
        from megamm.data.run_data import open_run_data

        open_run_data(run)
        if nproc > 1:
            launch.launch(["train", str(config), *(overrides or [])], nproc)
            return
    log_to_console()
    from megamm.train import train as run_training

    run_training(run)


@app.command()
def doctor() -> None:
    """What this machine and installation offer a run, and what is wrong; exit code 1 if something is."""
    from megamm.doctor import examine

    if not examine().show():
        raise typer.Exit(1)


def yaml_of(run: BaseModel) -> str:
    """A config as YAML, defaults filled in."""
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False)


def main() -> None:
    """Entry point of the console script and of `python -m megamm`."""
    # Before torch is loaded. Threads that spin while they wait make training ten times slower where cores are shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except UserError as error:
        if not error.on_all_ranks or os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
