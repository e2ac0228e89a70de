"""`megamm runs|attach|report|simulate-faults`: watch runs, report on them, and simulate larger ones."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from megamm.cli.common import print_tables, writable_file
from megamm.common.errors import UserError

app = typer.Typer()

ASSUMED = {"detection": 10.0, "hang_detection": 30.0, "restart": 120.0, "stall": 1.0, "lag": 60.0}
"""Seconds that are used when neither an option nor a run gives them; not measured. The two detection times are the ends
of the range that ByteRobust reports (10 to 30 s)."""


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="a run's output folder")],
    out: Annotated[
        Path | None, typer.Option(help="HTML file to write (default: RUN/report.html)", callback=writable_file)
    ] = None,
) -> None:
    """Write one self-contained HTML page about a run: losses, speed, failures, restarts and goodput."""
    from megamm.observability.report.run import write_report

    if out is not None and not out.parent.is_dir():
        raise UserError("no such folder", where=out.parent, remedy="create it, or choose another --out")
    print(f"report: {write_report(run, out)}")


@app.command("runs")
def list_runs(
    folders: Annotated[list[Path], typer.Argument(help="output folders of runs, or folders above them")],
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object per run")] = False,
) -> None:
    """List runs: state, step, losses, goodput, restarts, age of the oldest heartbeat, log. Only reads their folders."""
    from megamm.observability.report import runs

    found = runs.statuses(runs.find(folders))
    if as_json:
        print(*(json.dumps(asdict(one)) for one in found), sep="\n")
    elif found:
        print_tables(runs.table(found))
        print(
            *(f"{one.run}: {one.state}, {one.why}" for one in found if one.state not in ("running", "done")), sep="\n"
        )
    else:
        print("no runs found")


@app.command()
def attach(
    run: Annotated[Path, typer.Argument(help="a run's output folder")],
    as_json: Annotated[bool, typer.Option("--json", help="print events and metrics as recorded")] = False,
) -> None:
    """Follow a run's events and metrics until it ends; exit code 1 if it failed. Ctrl-C does not stop the run."""
    from megamm.observability.report import runs

    if runs.find([run])[:1] != [run]:
        raise UserError("no events and no metrics of a run", where=run, remedy="give the `output` folder of a run")
    try:
        for line in runs.follow(run):
            print(json.dumps(line) if as_json else runs.format_line(line), flush=True)
    except KeyboardInterrupt:
        return
    ended = runs.status(run)
    print(json.dumps(asdict(ended)) if as_json else f"{ended.state}: {ended.why}")
    if ended.state == "failed":
        raise typer.Exit(1)


@app.command("simulate-faults")
def simulate_faults(
    gpus: Annotated[int, typer.Option(help="GPUs of the simulated job", min=1)] = 16_384,
    days: Annotated[float, typer.Option(help="length of the simulated job", min=0.01, max=3650)] = 54.0,
    run: Annotated[Path | None, typer.Option(help="use the costs that this run measured")] = None,
    detection: Annotated[float | None, typer.Option(help="s until a dead rank is detected", min=0)] = None,
    hang_detection: Annotated[float | None, typer.Option(help="s until a hang is detected", min=0)] = None,
    restart: Annotated[float | None, typer.Option(help="s from detection to the first step", min=0)] = None,
    stall: Annotated[float | None, typer.Option(help="s that a checkpoint stops the steps", min=0.001)] = None,
    lag: Annotated[float | None, typer.Option(help="s from the stall until the checkpoint is usable", min=0)] = None,
    interval: Annotated[float | None, typer.Option(help="s between checkpoints (default: Daly)", min=0.1)] = None,
    spares: Annotated[int | None, typer.Option(help="spare nodes (default: 1 %, at least 1)", min=0)] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1)] = 8,
    repair_hours: Annotated[float, typer.Option(help="hours until a lost node is back", min=0)] = 24.0,
    max_restarts: Annotated[int | None, typer.Option(help="restarts until an operator is needed", min=0)] = None,
    operator_seconds: Annotated[float, typer.Option(help="s until the operator restarts the job", min=0)] = 3600.0,
    rate_factor: Annotated[float, typer.Option(help="multiplies the published failure rate", min=1e-6)] = 1.0,
    runs: Annotated[int, typer.Option(help="simulated runs", min=2)] = 200,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Simulate the goodput of a large job at Llama 3's published failure rates; prints every assumption."""
    from megamm.observability.simulate import Costs, Scenario, daly, measure, simulate, text

    given = dict(zip(ASSUMED, (detection, hang_detection, restart, stall, lag), strict=True))
    measured, sources = measure(run, gpus) if run is not None else ({}, {})
    costs = ASSUMED | measured | {name: value for name, value in given.items() if value is not None}
    sources = dict.fromkeys(ASSUMED, "assumed, not measured") | sources
    sources |= {name: "given" for name, value in given.items() if value is not None}
    if interval is not None and interval < costs["lag"]:
        raise UserError(
            f"--interval {interval:g} s is shorter than the {costs['lag']:g} s that writing a checkpoint takes",
            remedy="raise --interval or lower --lag",
        )
    nodes = -(-gpus // gpus_per_node)
    scenario = Scenario(
        gpus=gpus,
        days=days,
        costs=Costs(**costs),
        interval=interval or 1.0,
        spares=max(nodes // 100, 1) if spares is None else spares,
        repair_hours=repair_hours,
        max_restarts=max_restarts,
        operator_seconds=operator_seconds,
        rate_factor=rate_factor,
    )
    if interval is None:
        # A save starts only after the previous one is written: the lag is the shortest interval.
        best = max(daly(costs["stall"], scenario.mean_seconds_between_stops), costs["lag"])
        scenario = scenario.every(best)
    print(text(scenario, simulate(scenario, runs, seed), sources, seed))
