"""`megamm data`: public and own media to shards, and shards to token caches."""

from pathlib import Path
from typing import Annotated

import typer

from megamm.cli.common import DeviceChoice, Sources, log_to_console
from megamm.cli.data_build import build_shards

app = typer.Typer(no_args_is_help=True, help="Fetch public data, build shards, cache tokens.")


@app.command("fetch")
def fetch_sources(
    names: Annotated[list[str], typer.Argument(help="emoji, clipart")],
    to: Annotated[Path, typer.Option(help="folder for the raw data: RAW/<source>")],
) -> None:
    """Fetch public image-caption pairs from Debian packages (nothing is installed); what is there is kept."""
    from megamm.data.sources import fetch

    log_to_console()
    for name in names:
        folder, pairs = fetch(name, to)
        print(f"{folder}: fetched already, kept" if pairs is None else f"{folder}: {pairs} pairs")


app.command("build")(build_shards)


@app.command("index")
def index_shards(folder: Annotated[Path, typer.Argument(help="folder of 000000.tar, 000001.tar, ...")]) -> None:
    """(Re)build the indexes of a folder of WebDataset tars, one modality a folder."""
    from megamm.data.shard_index import write_index

    print(f"{folder}: {write_index(folder)} members indexed")


@app.command("tokenize")
def tokenize_shards(
    sources: Sources,
    codec: Annotated[list[str], typer.Option(help="modality=FOLDER, once a modality")],
    device: DeviceChoice = "auto",
) -> None:
    """Make the token caches of built shards; complete ones are kept."""
    from megamm.data.token_cache import load_codecs, tokenize
    from megamm.device import choose

    log_to_console()
    for cache in tokenize(sources, load_codecs(codec, choose(device).torch_device)):
        kept = " (kept)" if cache.kept else ""
        print(f"{cache.folder}: {cache.samples} samples, {cache.tokens} tokens{kept}")
