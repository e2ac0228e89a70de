"""`megamm convert`: convert between native checkpoints and Hugging Face folders; make other formats of an export.

Exit code 1: the verification failed, or a difference or damage was found; 2: wrong input.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from megamm.cli.common import writable_file, writable_folder
from megamm.common.log import log_to_console
from megamm.convert.plan import SHARD_SIZE

app = typer.Typer(
    no_args_is_help=True, help="Export to and import from Hugging Face folders; inspect, compare, verify."
)
Export = Annotated[Path, typer.Argument(help="a folder made by `megamm convert export`")]
Model = Annotated[Path, typer.Argument(help="run, checkpoint, Hugging Face folder or safetensors file")]
Processes = Annotated[int, typer.Option(help="number of processes; 0: one per core", min=0)]
ShardSize = Annotated[int, typer.Option(help="maximum bytes of a weights file", min=1)]
Dtype = Annotated[
    Literal["fp32", "bf16", "fp16"] | None, typer.Option(help="dtype of the weights (default: unchanged)")
]
Trim = Annotated[bool, typer.Option("--trim-vocabulary", help="drop embedding rows beyond the tokenizer's ids")]
Logits = Annotated[bool, typer.Option("--logits/--no-logits", help="compare both models' logits at the end")]
Gate = Annotated[bool, typer.Option("--gate/--no-gate", help="verify the result against its source")]
RefuseNan = Annotated[bool, typer.Option("--refuse-nan", help="NaN or Inf in a weight is an error, not a warning")]


@app.command("export")
def export_run(
    run: Annotated[Path, typer.Argument(help="a run's output folder, or one checkpoint")],
    out: Annotated[Path, typer.Argument(help="Hugging Face folder to create", callback=writable_folder)],
    nproc: Processes = 0,
    shard_size: ShardSize = SHARD_SIZE,
    dtype: Dtype = None,
    trim_vocabulary: Trim = False,
    logits: Logits = True,
    refuse_nan: RefuseNan = False,
    gate: Gate = True,
) -> None:
    """Export to a folder that transformers' AutoModelForCausalLM loads: safetensors, config and tokenizers.

    After an interruption, the same command resumes.
    """
    from megamm.convert.export import export
    from megamm.convert.io.dtypes import DTYPES
    from megamm.convert.verify.equivalence import VerificationOptions

    log_to_console()
    chosen, verification = None if dtype is None else DTYPES[dtype], VerificationOptions(logits, refuse_nan, gate)
    with _verification_errors():
        made = export(
            run,
            out,
            nproc=nproc,
            shard_size=shard_size,
            dtype=chosen,
            trim_vocabulary=trim_vocabulary,
            verification=verification,
        )
        print(f"exported to {made}")


@app.command("import")
def import_export(
    folder: Annotated[Path, typer.Argument(help="an export, or a Hugging Face folder with its tokenizer")],
    run: Annotated[
        Path, typer.Argument(help="output folder of a new run; it starts from these weights", callback=writable_folder)
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example data.seq_length=4096")] = None,
    nproc: Processes = 0,
    shard_size: ShardSize = SHARD_SIZE,
    dtype: Dtype = None,
    logits: Logits = True,
    refuse_nan: RefuseNan = False,
    gate: Gate = True,
) -> None:
    """Write step 0 of a new run with bit-identical weights. After an interruption, the same command resumes."""
    from megamm.convert.import_folder import import_
    from megamm.convert.io.dtypes import DTYPES
    from megamm.convert.verify.equivalence import VerificationOptions

    log_to_console()
    chosen, verification = None if dtype is None else DTYPES[dtype], VerificationOptions(logits, refuse_nan, gate)
    with _verification_errors():
        made = import_(
            folder,
            run,
            nproc=nproc,
            shard_size=shard_size,
            dtype=chosen,
            overrides=overrides or [],
            verification=verification,
        )
        print(f"imported to {made}")


@app.command()
def inspect(model: Model) -> None:
    """Print a tree of tensors: shapes, dtypes, norms and, for a native checkpoint, the ranks whose files hold them."""
    from megamm.convert.verify.weights import tree

    log_to_console()
    for line in tree(model):
        print(line)


@app.command()
def diff(one: Model, other: Model) -> None:
    """Compare the tensors of two models in any format, find the first layer that differs; exit code 1 if any does."""
    from megamm.convert.verify.weights import compare

    log_to_console()
    found = compare(one, other)
    print(*found.lines, sep="\n", end="\n" if found.lines else "")
    if found.first_layer is not None:
        print(f"the first layer that differs is layer {found.first_layer}")
    print(f"{found.same} tensors are bit-identical")
    if found.lines:
        raise typer.Exit(1)


@app.command()
def verify(model: Model, refuse_nan: RefuseNan = False) -> None:
    """Check digests, names and shapes against the config, NaN and Inf; exit code 1 if there is a problem."""
    from megamm.convert.verify.weights import verify as verified

    log_to_console()
    report = verified(model, refuse_nan=refuse_nan)
    print(*report.lines, *(f"problem: {problem}" for problem in report.problems), sep="\n")
    if report.problems:
        raise typer.Exit(1)


@app.command("modules")
def split_export(
    export: Export,
    out: Annotated[Path, typer.Argument(help="folder to create", callback=writable_folder)],
) -> None:
    """Split an export into parts that load alone: text_base, image_decoder, audio_encoder, multimodal_fusion."""
    from megamm.convert.extras.modules import split

    log_to_console()
    print(*(out / name for name in split(export, out)), sep="\n")


@app.command("join")
def join_modules(
    modules: Annotated[Path, typer.Argument(help="a folder made by `megamm convert modules`")],
    out: Annotated[Path, typer.Argument(help="export to create", callback=writable_folder)],
) -> None:
    """Join text_base and multimodal_fusion to the export that they were split from."""
    from megamm.convert.extras.modules import join

    log_to_console()
    print(f"joined to {join(modules, out)}")


@app.command("quantize")
def quantize_export(
    export: Export,
    out: Annotated[Path, typer.Argument(help="folder to create", callback=writable_folder)],
    to: Annotated[Literal["int8", "int4", "fp8"], typer.Option(help="format of the layers' matrices")],
) -> None:
    """Write an export with quantised weights in the format of compressed-tensors, which transformers reads."""
    from megamm.convert.extras.quantize import quantize

    log_to_console()
    print(f"quantised to {quantize(export, out, to)}")


@app.command("gguf")
def export_gguf(
    export: Export,
    out: Annotated[Path, typer.Argument(help="GGUF file to create", callback=writable_file)],
    without_normalizer: Annotated[
        bool, typer.Option("--without-normalizer", help="accept a tokenizer with NFC, which llama.cpp does not apply")
    ] = False,
) -> None:
    """Write an export's model and tokenizer as one GGUF file, which llama.cpp reads."""
    from megamm.convert.extras.gguf import write_gguf

    log_to_console()
    print(f"wrote {write_gguf(export, out, without_normalizer=without_normalizer)}")


@app.command("card")
def write_model_card(
    export: Export,
    evaluation: Annotated[Path, typer.Argument(help="file written by `megamm eval --json` for this export")],
) -> None:
    """Rewrite an export's README.md with its evaluation, and update the digests of its files."""
    from megamm.convert.extras.card import read_evaluation, write_card
    from megamm.convert.io.export_folder import read_metadata

    write_card(export, read_metadata(export)[2], read_evaluation(evaluation))
    print(f"wrote {export / 'README.md'}")


@contextmanager
def _verification_errors() -> Iterator[None]:
    """Print a failed verification as one line and exit with code 1."""
    from megamm.convert.verify.equivalence import VerificationError

    try:
        yield
    except VerificationError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
