"""`megamm plan`: parallel layouts for a config on a number of GPUs, with predicted memory and speed."""

from pathlib import Path
from typing import Annotated

import typer

from megamm.cli.common import print_tables, writable_file
from megamm.common.errors import UserError

app = typer.Typer()


@app.command()
def plan(
    config: Annotated[Path | None, typer.Argument(help="YAML file of the run")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example train.steps=100")] = None,
    gpus: Annotated[int, typer.Option(help="GPUs of the job", min=1)] = 8,
    gpu: Annotated[str, typer.Option(help="kind of GPU (a100, h100, h200, b200), or a file of --calibrate")] = "h100",
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of a node", min=1)] = 8,
    top: Annotated[int, typer.Option(help="layouts to print", min=1)] = 5,
    tokens: Annotated[float | None, typer.Option(help="tokens to train on (default: those of the config)")] = None,
    vocabulary_size: Annotated[int | None, typer.Option(help="use this size, needs no data", min=1)] = None,
    write: Annotated[
        Path | None, typer.Option(help="file for the best layout's key=value lines", callback=writable_file)
    ] = None,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="measure this node's GPUs and exit")] = False,
) -> None:
    """Find the fastest layouts that fit, with predicted memory and time; needs no GPU.

    Memory and time are computed from the config and constants of the GPU; no run is started. With --calibrate: measure
    products, memory and collectives of this node, and print the constants for --gpu FILE, or write them to --write.
    """
    if calibrate:
        _calibrate(gpu, write)
        return
    if config is None:
        raise UserError("no config given", remedy="megamm plan CONFIG --gpus N")
    from megamm.common import gpu_constants as constants
    from megamm.config import load_config
    from megamm.plan import report, search
    from megamm.plan.job import Documents

    run, device = load_config(config, overrides or []), constants.load(gpu)
    documents = Documents.whole_rows(run.data.seq_length)
    if vocabulary_size is None:
        from megamm.data.pipeline.run_data import open_run_data
        from megamm.plan.documents import of_data

        try:
            data = open_run_data(run)
        except UserError as error:
            raise UserError(error.what, where=error.where, remedy=f"{error.remedy}, or add --vocabulary-size") from None
        vocabulary_size, documents = data.vocabulary.size, of_data(data)
    found = search.search(device, run, gpus, vocabulary_size, documents, gpus_per_node)
    if not found.plans:
        needed = f"{found.smallest / constants.GIB:.1f} GiB"
        raise UserError(
            f"no layout of {gpus} GPUs fits into {device.name}: the smallest needs {needed} for tensors",
            remedy="use more GPUs, or GPUs with more memory",
        )
    best = search.without_variants(found.plans)[:top]
    print(*report.summary(device, found, len(best)), sep="\n")
    all_tokens = tokens or float(run.train.steps * run.train.global_batch_size * run.data.seq_length)
    print_tables(report.layouts(device, best, all_tokens), report.breakdown(best))
    print("overrides of layout 1:", *best[0].overrides, sep="\n")
    if write is not None:
        write.write_text("\n".join(best[0].overrides) + "\n")
        print(f"written: {write}")


def _calibrate(gpu: str, write: Path | None) -> None:
    from megamm.common import device
    from megamm.common import gpu_constants as constants
    from megamm.plan import calibrate

    if not device.will_be_gpu("auto"):
        raise UserError(
            "megamm plan --calibrate: torch sees no GPU", remedy="run it on a node with the GPUs to measure"
        )
    text = constants.to_yaml(calibrate.measure(constants.load(gpu), device.choose("gpu")))
    if write is None:
        print(text, end="")
    else:
        write.write_text(text)
        print(f"written: {write}")
