"""`megamm convert modules | join | quantize | gguf | card`: make other formats of an export."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from megamm.common.log import log_to_console

app = typer.Typer()
Export = Annotated[Path, typer.Argument(help="a folder made by `megamm convert export`")]


@app.command("modules")
def split_export(
    export: Export,
    out: Annotated[Path, typer.Argument(help="folder to create")],
) -> None:
    """Split an export into parts that load alone: text_base, image_decoder, audio_encoder, multimodal_fusion."""
    from megamm.convert.extras.modules import split

    log_to_console()
    print(*(out / name for name in split(export, out)), sep="\n")


@app.command("join")
def join_modules(
    modules: Annotated[Path, typer.Argument(help="a folder made by `megamm convert modules`")],
    out: Annotated[Path, typer.Argument(help="export to create")],
) -> None:
    """Join text_base and multimodal_fusion to the export that they were split from."""
    from megamm.convert.extras.modules import join

    log_to_console()
    print(f"joined to {join(modules, out)}")


@app.command("quantize")
def quantize_export(
    export: Export,
    out: Annotated[Path, typer.Argument(help="folder to create")],
    to: Annotated[Literal["int8", "int4", "fp8"], typer.Option(help="format of the layers' matrices")],
) -> None:
    """Write an export with quantised weights in the format of compressed-tensors, which transformers reads."""
    from megamm.convert.extras.quantize import quantize

    log_to_console()
    print(f"quantised to {quantize(export, out, to)}")


@app.command("gguf")
def export_gguf(
    export: Export,
    out: Annotated[Path, typer.Argument(help="GGUF file to create")],
) -> None:
    """Write an export's model and tokenizer as one GGUF file, which llama.cpp reads."""
    from megamm.convert.extras.gguf import write_gguf

    log_to_console()
    print(f"wrote {write_gguf(export, out)}")


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
