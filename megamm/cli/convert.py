"""`megamm convert export|import|inspect|diff|verify`: weights between native checkpoints and folders of transformers.

Exit code 1: the gate failed, or a difference or damage was found; 2: something for the user to mend.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from megamm.cli import exports
from megamm.cli.common import log_to_console
from megamm.convert.plan import SHARD_SIZE

app = typer.Typer(no_args_is_help=True, help="Export to and import from Hugging Face folders; look at what there is.")
app.add_typer(exports.app)
Place = Annotated[Path, typer.Argument(help="run, checkpoint, folder of transformers or safetensors file")]
Processes = Annotated[int, typer.Option(help="that convert; 0: one a core", min=0)]
ShardSize = Annotated[int, typer.Option(help="bytes of a file", min=1)]
Dtype = Annotated[Literal["fp32", "bf16", "fp16"] | None, typer.Option(help="of the weights; by default as they are")]
Logits = Annotated[bool, typer.Option("--logits/--no-logits", help="compare both models' logits at the end")]
Gate = Annotated[bool, typer.Option("--gate/--no-gate", help="compare the result with what it was made of")]
RefuseNan = Annotated[bool, typer.Option("--refuse-nan", help="NaN or Inf in a weight is an error, not a warning")]


@app.command("export")
def export_run(
    run: Annotated[Path, typer.Argument(help="a run's output folder, or one checkpoint")],
    out: Annotated[Path, typer.Argument(help="Hugging Face folder to make")],
    nproc: Processes = 0,
    shard_size: ShardSize = SHARD_SIZE,
    dtype: Dtype = None,
    logits: Logits = True,
    refuse_nan: RefuseNan = False,
    gate: Gate = True,
) -> None:
    """Write safetensors, config, tokenizer and codecs that transformers' AutoModelForCausalLM loads.

    If it is killed, the same command goes on.
    """
    from megamm.convert.elements import DTYPES
    from megamm.convert.hf import Checks, export

    log_to_console()
    chosen, checks = None if dtype is None else DTYPES[dtype], Checks(logits, refuse_nan, gate)
    with _gated():
        print(f"exported to {export(run, out, nproc=nproc, shard_size=shard_size, dtype=chosen, checks=checks)}")


@app.command("import")
def import_export(
    folder: Annotated[Path, typer.Argument(help="an export, or a folder of transformers with its tokenizer")],
    run: Annotated[Path, typer.Argument(help="output folder of a new run; it starts from these weights")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example data.seq_length=4096")] = None,
    nproc: Processes = 0,
    shard_size: ShardSize = SHARD_SIZE,
    dtype: Dtype = None,
    logits: Logits = True,
    refuse_nan: RefuseNan = False,
    gate: Gate = True,
) -> None:
    """Write step 0 of a new run, weights bit for bit. If it is killed, the same command goes on."""
    from megamm.convert.elements import DTYPES
    from megamm.convert.hf import Checks, import_

    log_to_console()
    chosen, checks = None if dtype is None else DTYPES[dtype], Checks(logits, refuse_nan, gate)
    with _gated():
        made = import_(
            folder, run, nproc=nproc, shard_size=shard_size, dtype=chosen, overrides=overrides or [], checks=checks
        )
        print(f"imported to {made}")


@app.command()
def inspect(place: Place) -> None:
    """A tree of tensors with shapes, dtypes, norms and, of a native checkpoint, the ranks whose files hold them."""
    from megamm.convert.inspect import tree

    log_to_console()
    for line in tree(place):
        print(line)


@app.command()
def diff(one: Place, other: Place) -> None:
    """Tensors that differ between two of any format, and the first layer that has one; exit code 1 if any does."""
    from megamm.convert.diff import compare

    log_to_console()
    found = compare(one, other)
    print(*found.lines, sep="\n", end="\n" if found.lines else "")
    if found.first_layer is not None:
        print(f"the first layer that differs is layer {found.first_layer}")
    print(f"{found.same} tensors are the same bit for bit")
    if found.lines:
        raise typer.Exit(1)


@app.command()
def verify(place: Place, refuse_nan: RefuseNan = False) -> None:
    """Digests, names and shapes against the config, NaN and Inf; exit code 1 if something is wrong."""
    from megamm.convert.verify import verify as verified

    log_to_console()
    report = verified(place, refuse_nan=refuse_nan)
    print(*report.lines, *(f"wrong: {problem}" for problem in report.problems), sep="\n")
    if report.problems:
        raise typer.Exit(1)


@contextmanager
def _gated() -> Iterator[None]:
    """A gate that fails is one line and exit code 1."""
    from megamm.convert.gate import GateError

    try:
        yield
    except GateError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
