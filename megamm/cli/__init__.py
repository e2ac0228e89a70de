"""The `megamm` command: one sub-command per stage of a run; each only parses its arguments and calls a function.

Imports are inside the commands, so that `megamm --help` and a config error do not import torch.
A UserError becomes one line on stderr and exit code 2.
"""

import codecs
import io
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple, NoReturn

import typer
import yaml
from pydantic import BaseModel

from megamm.cli import checkpoint, convert, data, doctor, evaluate, inference, observe, plan, tokenizer
from megamm.common import exit_codes, outputs
from megamm.common.errors import UserError
from megamm.common.log import log_to_console
from megamm.elastic import torchrun

if TYPE_CHECKING:
    from megamm.config import RunConfig
    from megamm.elastic.graceful_stop import SignalStopCondition

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
app.add_typer(data.app, name="data")
app.add_typer(tokenizer.app, name="tokenizer")
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(convert.app, name="convert")
app.add_typer(inference.app)
app.add_typer(evaluate.app)
app.add_typer(doctor.app)
app.add_typer(observe.app)
app.add_typer(plan.app)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file of the run")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example train.steps=100")] = None,
    nproc: Annotated[int, typer.Option(help="processes on this node", min=1)] = 1,
    nnodes: Annotated[str, typer.Option(help="number of nodes, or least:most; run this command on each")] = "1",
    rendezvous: Annotated[str | None, typer.Option(help="HOST:PORT where nodes meet; HOST is one of them")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the resolved config, check it and exit")] = False,
    world_size: Annotated[int | None, typer.Option(help="dry run: number of ranks of the job", min=1)] = None,
    vocabulary_size: Annotated[int | None, typer.Option(help="dry run: use this size, needs no data", min=1)] = None,
    rank: Annotated[int | None, typer.Option(help="dry run: also print the position of this rank")] = None,
    fake_gpu: Annotated[str | None, typer.Option(help="dry run: simulate this GPU, e.g. h100: memory, waits")] = None,
    stages: Annotated[bool, typer.Option("--stages", help="fake GPU: a rank of each pipeline stage")] = False,
    exact: Annotated[bool, typer.Option("--exact", help="fake GPU: build all layers, extrapolate nothing")] = False,
    imbalance: Annotated[float, typer.Option(help="fake GPU: tokens of a rank's experts, of their share", min=0)] = 1.0,
) -> None:
    """Train, or resume from the newest valid checkpoint in the run's output folder.

    Ranks that fail or hang are restarted in place (resilience in the config). With resilience.max_restarts=0, a single
    rank runs in this process. Exit codes: 0 done, 1 failed, 2 wrong input, 3 gave up, 4 this node was evicted,
    75 stopped by a signal with a checkpoint written.
    """
    from megamm.config import load_config
    from megamm.elastic import launcher

    run = load_config(config, overrides or [])
    nodes = launcher.Nodes.parse(nnodes, rendezvous)
    simulated = SimulationOptions(fake_gpu, stages, exact, imbalance)
    if dry_run and fake_gpu is not None:
        _simulate(run, world_size or nproc * nodes.most, vocabulary_size, rank, simulated)
        return
    if simulated != SimulationOptions():
        remedy = "add --dry-run --fake-gpu GPU, or remove them"
        raise UserError("--fake-gpu, --stages, --exact and --imbalance are for a simulated dry run", remedy=remedy)
    if dry_run:
        from megamm.train.dry_run import report

        text, inconsistent = report(run, world_size or nproc * nodes.most, vocabulary_size, rank)
        print(yaml_of(run), text, sep="\n")
        if inconsistent:
            print(f"inconsistent: {inconsistent}", file=sys.stderr)
            raise typer.Exit(1)
        return
    if (world_size, vocabulary_size, rank) != (None, None, None):
        raise UserError("--world-size, --vocabulary-size and --rank are for --dry-run", remedy="add --dry-run")
    torchrun.check_environment(nproc, nodes.most, "--nproc and --nnodes")

    if torchrun.is_rank():
        from megamm.convert import exportable

        exportable.check(run)
        _train_here(run, None)
        return
    # Every error that can be found before a rank starts is found first. `supervise` has the data checked by a process
    # forked from one that imports torch in any case: this process does not import it.
    check_output(run.output)
    launcher.admissible_nodes(run, nproc, nodes)
    if run.resilience.max_restarts or nproc * nodes.most > 1:
        raise typer.Exit(launcher.supervise(run, nproc, nodes, "megamm.train.ranks"))
    from megamm.elastic.graceful_stop import SignalStopCondition
    from megamm.train import checks

    checks.check(run)
    _train_here(run, SignalStopCondition())


class SimulationOptions(NamedTuple):
    """The options of `megamm train` for a simulated GPU."""

    gpu: str | None = None
    stages: bool = False
    exact: bool = False
    imbalance: float = 1.0


def _simulate(
    run: "RunConfig", world_size: int, vocabulary_size: int | None, rank: int | None, options: SimulationOptions
) -> None:
    """Print what ranks of the run would do on a GPU; exit code 1 if one of them does not fit."""
    from megamm.fakegpu import report
    from megamm.fakegpu.simulator import Simulator
    from megamm.model import layout

    assert options.gpu is not None
    layout.check(run, world_size)
    ranks = report.ranks_to_simulate(run, world_size, rank, options.stages)
    if vocabulary_size is None:
        from megamm.train.dry_run import vocabulary_size_of

        vocabulary_size = vocabulary_size_of(run)
    with Simulator(options.gpu, options.imbalance) as simulator:
        question = report.Question(run, vocabulary_size, world_size, options.exact)
        text, fits = report.report(simulator, question, ranks)
    print(text)
    if not fits:
        raise typer.Exit(1)


def _train_here(run: "RunConfig", stop_when: "SignalStopCondition | None") -> None:
    """Train in this process: as a rank, or as the only process of the run, then with `stop_when`."""
    log_to_console()
    from megamm.elastic import rank, rank_status, run_lock
    from megamm.train.trainer import train as run_training

    if rank_status.HEARTBEAT_PAGE not in os.environ and os.environ.get("RANK", "0") == "0":  # no agent holds the lock
        run_lock.hold(run.output, f"{os.getpid()} of {socket.gethostname()}")
    try:
        if run_training(run, stop_when) == "requeue":
            raise typer.Exit(exit_codes.REQUEUE)
    except rank.NodeFault as fault:
        if os.environ.get("RANK", "0") == "0":
            rank.report_eviction(run.output, str(fault), step=None, attempt=0)
        raise typer.Exit(exit_codes.EVICTED) from None


def check_output(run: Path) -> None:
    """Raise UserError if the run cannot write to its folder, or to what an earlier launch has left there."""
    from megamm.common.events import EVENTS
    from megamm.elastic.hang_detector import HANGS
    from megamm.elastic.heartbeat import HEARTBEATS
    from megamm.elastic.run_lock import LOCK
    from megamm.observability.metrics import METRICS

    outputs.check_folder(run, "output")
    outputs.check_inside(run, "output", (LOCK, EVENTS, METRICS), (HEARTBEATS, HANGS, "checkpoints"))


def yaml_of(run: BaseModel) -> str:
    """Return a config as YAML, with defaults filled in."""
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False)


def main() -> None:
    """Entry point of the console script and of `python -m megamm`."""
    # Set before torch is loaded. Threads that spin while waiting make training ten times slower on shared cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if isinstance(sys.stdout, io.TextIOWrapper) and codecs.lookup(sys.stdout.encoding).name != "utf-8":
        # Generated text can have characters that the terminal lacks.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        torchrun.take_leftovers()
        app()
    except UserError as error:
        _exit_with(error)
    except OSError as error:
        if (fixable := outputs.user_error(error)) is None:
            raise
        _exit_with(fixable)


def _exit_with(error: UserError) -> NoReturn:
    if not error.on_all_ranks or os.environ.get("RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr)
    sys.exit(exit_codes.CRASHED if error.is_transient else exit_codes.USER_ERROR)
