"""`megamm doctor`: what an installation offers; with --preflight, whether this node, or several, are fit for a run."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from megamm.cli.common import log_to_console, print_tables
from megamm.errors import UserError

app = typer.Typer()


@app.command()
def doctor(
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for --config")] = None,
    preflight: Annotated[bool, typer.Option("--preflight", help="look at this node's hardware, too")] = False,
    config: Annotated[Path | None, typer.Option(help="YAML file of the run that is to start")] = None,
    output: Annotated[Path | None, typer.Option(help="the run's folder [of the config, else this one]")] = None,
    scratch: Annotated[Path | None, typer.Option(help="local folder of a node [that of temporary files]")] = None,
    gpus: Annotated[int | None, typer.Option(help="that this node must have [any number]", min=0)] = None,
    least_write: Annotated[float | None, typer.Option(help="MB/s to each folder [10]", min=0)] = None,
    nnodes: Annotated[str, typer.Option(help="look at so many nodes, or least:most; on each of them")] = "1",
    rendezvous: Annotated[str | None, typer.Option(help="HOST:PORT where nodes meet; HOST is one of them")] = None,
    join: Annotated[float, typer.Option(help="s until the other nodes must be there", min=0)] = 120.0,
    least_bandwidth: Annotated[
        float | None, typer.Option(help="GB/s of an all-reduce between two nodes [half the median]", min=0)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for launchers, in one line")] = False,
) -> None:
    """What this machine and installation offer a run, and what is wrong; exit code 1 if something is.

    With --preflight or several --nnodes: GPUs, InfiniBand, memory, limits, disks, clocks, and between nodes versions
    and bandwidth. The exit code of a command is that of its own node; a bad one is named in one line on stderr.
    """
    # Before torch is loaded: what goes wrong between nodes is told in one line, not in stacks of the store's.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    from megamm.resilience.supervisor import Nodes

    nodes = Nodes.parse(nnodes, rendezvous)
    if not preflight and nodes.most == 1:
        given = (config, output, scratch, gpus, least_write, least_bandwidth, overrides or None)
        if as_json or any(value is not None for value in given):
            raise UserError("that option is for a look at the node", remedy="add --preflight")
        from megamm.doctor.installation import examine

        if not examine().show():
            raise typer.Exit(1)
        return
    if overrides and config is None:
        raise UserError("key=value without a config", where=overrides[0], remedy="add --config CONFIG")
    log_to_console()
    from megamm.config import load_config
    from megamm.doctor import cluster, findings
    from megamm.doctor.node import Expected
    from megamm.doctor.node import preflight as look

    run = load_config(config, overrides or []) if config is not None else None
    limits = {"gpus": gpus, "output": output, "scratch": scratch, "least_write": least_write}
    own = look(Expected.by(run, limits))
    result = cluster.compare(own, nodes, join, least_bandwidth) if nodes.most > 1 else cluster.Result(own, (own,))
    if as_json:
        print(json.dumps(result.to_json()))
    else:
        print_tables(*findings.tables(result.nodes))
        if result.together is not None:
            print(f"all-reduce over all nodes: {result.together:.3g} GB/s")
    for line in result.lines():
        print(line, file=sys.stderr)
    if not result.is_fit:
        raise typer.Exit(1)
