"""`megamm data`: public and own media to shards, and shards to token caches."""

from pathlib import Path
from typing import Annotated

import typer

from megamm.cli.common import DeviceChoice, Sources, log_to_console

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


@app.command("build")
def build_shards(
    raws: Annotated[list[Path], typer.Argument(help="folders with a pairs.jsonl: RAW/<source>")],
    to: Annotated[Path, typer.Option(help="folder of the shard sets: SHARDS")],
    heldout: Annotated[float, typer.Option(help="share of the nouns that is held out")] = 0.05,
    max_broken: Annotated[float, typer.Option(help="share of broken pairs above which nothing is written")] = 0.02,
    limit: Annotated[int | None, typer.Option(help="take a random subset of so many pairs a source")] = None,
    image_size: Annotated[int, typer.Option(help="pixels of the longer side of a rendered drawing")] = 128,
) -> None:
    """Check every image by decoding it, render drawings, and write shards split by noun."""
    from megamm.data.build import BuildOptions, build

    log_to_console()
    for report in build(raws, to, BuildOptions(heldout, max_broken, limit, image_size)):
        print(report.summary())
    print(f"{to}/report.json names every pair that was left out")


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
