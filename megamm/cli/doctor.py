"""`megamm doctor`: check the installation; with --preflight or --nnodes, check whether nodes are fit for a run."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from megamm.cli.common import print_tables
from megamm.common.errors import UserError
from megamm.common.log import log_to_console

app = typer.Typer()


@app.command()
def doctor(
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for --config")] = None,
    preflight: Annotated[bool, typer.Option("--preflight", help="also check this node's hardware")] = False,
    config: Annotated[Path | None, typer.Option(help="YAML file of the run to start")] = None,
    output: Annotated[Path | None, typer.Option(help="run's folder (default: of --config, else this one)")] = None,
    scratch: Annotated[Path | None, typer.Option(help="node's local folder (default: for temporary files)")] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs that this node must have (default: any)", min=0)] = None,
    least_write: Annotated[float | None, typer.Option(help="MB/s to each folder (default: 10)", min=0)] = None,
    nnodes: Annotated[str, typer.Option(help="nodes to check, or least:most; run this on each")] = "1",
    rendezvous: Annotated[str | None, typer.Option(help="HOST:PORT where nodes meet; HOST is one of them")] = None,
    join: Annotated[float, typer.Option(help="s to wait for the other nodes", min=0)] = 120.0,
    least_bandwidth: Annotated[
        float | None,
        typer.Option(help="GB/s of an all-reduce between two nodes (default: half the median)", min=0),
    ] = None,
    kernels: Annotated[bool, typer.Option("--kernels", help="compare this device's kernels with plain torch")] = False,
    again: Annotated[bool, typer.Option("--again", help="with --kernels: compare also what is known")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one line of JSON for launchers")] = False,
) -> None:
    """Show what this machine and installation offer a run, and list problems; exit code 1 if there are any.

    With --preflight or several --nnodes: check GPUs, InfiniBand, memory, limits, disks and clocks, and compare versions
    and bandwidth between nodes. Each command's exit code is that of its own node; a bad node is one line on stderr.

    With --kernels: compare the kernels of a typical run, or of --config, with plain torch, time them, and keep the
    outcome for runs; exit code 1 if one disagrees.
    """
    # Set before torch is loaded: errors between nodes are reported in one line, without stacks from torch's store.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    from megamm.elastic.launcher import Nodes

    nodes = Nodes.parse(nnodes, rendezvous)
    if kernels:
        if preflight or nodes.most > 1:
            raise UserError("--kernels looks at one device", remedy="remove --preflight and --nnodes")
        _kernels(config, overrides or [], again, as_json)
        return
    if again:
        raise UserError("--again requires --kernels", remedy="add --kernels")
    if not preflight and nodes.most == 1:
        given = (config, output, scratch, gpus, least_write, least_bandwidth, overrides or None)
        if as_json or any(value is not None for value in given):
            raise UserError("this option requires --preflight", remedy="add --preflight")
        from megamm.doctor.installation import examine

        if not examine().show():
            raise typer.Exit(1)
        return
    if overrides and config is None:
        raise UserError("key=value needs a config", where=overrides[0], remedy="add --config CONFIG")
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


def _kernels(config: Path | None, overrides: list[str], again: bool, as_json: bool) -> None:
    """Print the outcomes of the kernels; exit code 1 if one disagrees."""
    if overrides and config is None:
        raise UserError("key=value needs a config", where=overrides[0], remedy="add --config CONFIG")
    log_to_console()
    from megamm.config import load_config
    from megamm.doctor.kernels import survey

    report = survey(load_config(config, overrides) if config is not None else None, again)
    if as_json:
        print(json.dumps(report.to_json()))
    else:
        print_tables(report.table())
    for line in report.faults:
        print(f"kernel disagrees with plain torch: {line}", file=sys.stderr)
    if report.faults:
        raise typer.Exit(1)
