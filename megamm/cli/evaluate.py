"""`megamm eval`: held-out losses of an export, or a suite of metrics with a report."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from megamm.cli.common import DeviceChoice, writable_file
from megamm.common.errors import UserError
from megamm.common.log import log_to_console

app = typer.Typer()


@app.command("eval")
def evaluate_export(
    export: Annotated[Path, typer.Argument(help="a folder made by `megamm convert export`")],
    sources: Annotated[list[Path] | None, typer.Argument(help="source folders: SHARDS/<source>")] = None,
    limit: Annotated[int | None, typer.Option(help="most held-out samples per source", min=1)] = None,
    seed: Annotated[int, typer.Option(help="seed of the shuffled partners")] = 0,
    run: Annotated[Path | None, typer.Option(help="also compare logits with this run's own model")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="write the results to this file", callback=writable_file)
    ] = None,
    suite: Annotated[Path | None, typer.Option(help="YAML file of metrics, in place of sources")] = None,
    to: Annotated[Path | None, typer.Option(help="folder for the report of the suite", callback=writable_file)] = None,
    device: DeviceChoice = "auto",
) -> None:
    """Evaluate an export in stock transformers: held-out loss and pair gain of SOURCES, or the metrics of a suite.

    A suite (--suite FILE --to FOLDER) that was interrupted continues where it was.
    """
    log_to_console()
    if suite is not None:
        if sources or limit is not None or run is not None or json_file is not None or to is None:
            remedy = "give --suite with --to FOLDER; sources, n and seed are in the suite"
            raise UserError("--suite cannot be combined with sources, --limit, --run or --json", remedy=remedy)
        _run_suite(export, suite, to, device)
        return
    if not sources or to is not None:
        raise UserError("no sources to evaluate on", remedy="give SHARDS/<source>, or --suite FILE --to FOLDER")
    from megamm.common.device import choose
    from megamm.convert.io.export_folder import open_export
    from megamm.convert.verify.logits import logits_difference
    from megamm.evaluation.losses import evaluate, summary_lines
    from megamm.inference.export_subject import ExportSubject

    if json_file is not None and json_file.exists():
        raise UserError("the output exists", where=json_file, remedy="remove it or choose another")
    chosen = choose(device)
    subject = ExportSubject(open_export(export, chosen.torch_device))
    figures = evaluate(subject, sources, limit=limit, seed=seed).to_json()
    print(*summary_lines(figures), sep="\n")
    if run is not None:
        figures["logits_max_abs_diff"] = logits_difference(run, export, chosen)
        print(f"logits: at most {figures['logits_max_abs_diff']:.1e} from the run's own model")
    if json_file is not None:
        partial = json_file.with_name(f".{json_file.name}.partial")
        partial.write_text(json.dumps(figures, indent=1) + "\n")
        partial.rename(json_file)


def _run_suite(export: Path, suite_file: Path, to: Path, device: Literal["auto", "cpu", "gpu"]) -> None:
    """Run a suite, and write its report, or continue one."""
    from megamm.config.suite import load_suite

    suite = load_suite(suite_file)  # before anything large is imported
    from megamm.common.device import choose
    from megamm.convert.io.export_folder import open_export
    from megamm.evaluation import report
    from megamm.evaluation.suite import lines, open_tasks, run_suite
    from megamm.inference.export_subject import ExportSubject, digest_of_export
    from megamm.inference.harness import HarnessTask

    subject = ExportSubject(open_export(export, choose(device).torch_device))
    result = run_suite(subject, suite, to, digest_of_export(export), harness=HarnessTask)
    report.write(to, export.name, open_tasks(subject, suite, to, HarnessTask), suite, result)
    print(*lines(result["figures"]), sep="\n")
    print(f"{to / report.PAGE}: {len(result['figures'])} figures")
