"""What is made of an export: `megamm convert modules | join | quantize | gguf | card`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from megamm.cli.common import log_to_console

app = typer.Typer()
Export = Annotated[Path, typer.Argument(help="a folder made by `megamm convert export`")]


@app.command("modules")
def split_export(
    export: Export,
    out: Annotated[Path, typer.Argument(help="folder to make")],
) -> None:
    """Write an export's parts, each loadable alone: text_base, image_decoder, audio_encoder, multimodal_fusion."""
    from megamm.convert.modules import split

    log_to_console()
    print(*(out / name for name in split(export, out)), sep="\n")


@app.command("join")
def join_modules(
    modules: Annotated[Path, typer.Argument(help="a folder made by `megamm convert modules`")],
    out: Annotated[Path, typer.Argument(help="export to make")],
) -> None:
    """Put text_base and multimodal_fusion together again: the export they are parts of."""
    from megamm.convert.modules import join

    log_to_console()
    print(f"joined to {join(modules, out)}")


@app.command("quantize")
def quantize_export(
    export: Export,
    out: Annotated[Path, typer.Argument(help="folder to make")],
    to: Annotated[Literal["int8", "int4", "fp8"], typer.Option(help="of the layers' matrices")],
) -> None:
    """Write an export with quantised weights, in the format of compressed-tensors, which transformers reads."""
    from megamm.convert.quantize import quantize

    log_to_console()
    print(f"quantised to {quantize(export, out, to)}")


@app.command("gguf")
def export_gguf(
    export: Export,
    out: Annotated[Path, typer.Argument(help="GGUF file to make")],
) -> None:
    """Write an export's model and tokenizer as one GGUF file, which llama.cpp reads."""
    from megamm.convert.gguf import write_gguf

    log_to_console()
    print(f"wrote {write_gguf(export, out)}")


@app.command("card")
def write_model_card(
    export: Export,
    evaluation: Annotated[Path, typer.Argument(help="figures of it that `megamm eval --json` wrote")],
) -> None:
    """Write an export's README.md anew with its evaluation, and the digests of its files."""
    from megamm.convert.card import read_evaluation, write_card
    from megamm.convert.own import read_own

    write_card(export, read_own(export)[2], read_evaluation(evaluation))
    print(f"wrote {export / 'README.md'}")
