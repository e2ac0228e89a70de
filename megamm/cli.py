"""The `megamm` command: one sub-command per stage of a run; each only parses and calls.

Imports are inside the commands, so that `megamm --help` and a config error cost no torch import.
A UserError becomes one line on stderr and exit code 2.
"""

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Literal

import typer
import yaml
from pydantic import BaseModel

from megamm.errors import UserError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
data_app = typer.Typer(no_args_is_help=True, help="Fetch public data, build shards, cache tokens.")
tokenizer_app = typer.Typer(no_args_is_help=True, help="Train the tokenizers (codecs) of the modalities.")
convert_app = typer.Typer(no_args_is_help=True, help="Export to and import from Hugging Face folders.")
train_tokenizer_app = typer.Typer(no_args_is_help=True, help="Train a tokenizer on the train split of built shards.")
app.add_typer(data_app, name="data")
app.add_typer(tokenizer_app, name="tokenizer")
tokenizer_app.add_typer(train_tokenizer_app, name="train")
app.add_typer(convert_app, name="convert")


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file of the run")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example train.steps=100")] = None,
    nproc: Annotated[int, typer.Option(help="start that many local processes")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the resolved run, check it and stop")] = False,
    world_size: Annotated[int | None, typer.Option(help="dry run: of a job of that many ranks", min=1)] = None,
    vocabulary_size: Annotated[int | None, typer.Option(help="dry run: needs no data then", min=1)] = None,
    rank: Annotated[int | None, typer.Option(help="dry run: print the place of this rank too")] = None,
) -> None:
    """Train, or resume from the newest valid checkpoint in the run's output folder."""
    from megamm import launch, layout
    from megamm.config import load_config

    run = load_config(config, overrides or [])
    if dry_run:
        from megamm.dry_run import report

        text, inconsistent = report(run, world_size or nproc, vocabulary_size, rank)
        print(yaml_of(run), text, sep="\n")
        if inconsistent:
            print(f"inconsistent: {inconsistent}", file=sys.stderr)
            raise typer.Exit(1)
        return
    if (world_size, vocabulary_size, rank) != (None, None, None):
        raise UserError("--world-size, --vocabulary-size and --rank are for --dry-run", remedy="add --dry-run")
    if not launch.is_rank():
        # Everything that can be refused is refused here, before a process starts.
        layout.check(run, nproc)
        from megamm.data.run_data import open_run_data

        open_run_data(run)
        if nproc > 1:
            launch.launch(["train", str(config), *(overrides or [])], nproc)
            return
    _log_to_console()
    from megamm.train import train as run_training

    run_training(run)


Sources = Annotated[list[Path], typer.Argument(help="source folders: SHARDS/<source>")]
DeviceChoice = Annotated[Literal["auto", "cpu", "gpu"], typer.Option(help="where to compute")]


@train_tokenizer_app.command("text")
def train_text(
    sources: Sources,
    to: Annotated[Path, typer.Option(help="folder to make")],
    vocabulary: Annotated[int, typer.Option(help="number of tokens, at least 256")] = 4096,
) -> None:
    """Train a byte-level BPE tokenizer; the folder loads in transformers too."""
    from megamm.codecs.text import train_text_tokenizer

    _log_to_console()
    done = train_text_tokenizer(sources, to, vocabulary_size=vocabulary)
    print(f"{to}: {done['vocabulary_size']} tokens, {done['bytes_per_token']:.2f} bytes a token on held-out text")


@train_tokenizer_app.command("image")
def train_image(
    sources: Sources,
    to: Annotated[Path, typer.Option(help="folder to make")],
    steps: int = 1500,
    batch_size: int = 32,
    learning_rate: float = 4e-3,
    seed: int = 0,
    image_size: Annotated[int, typer.Option(help="pixels a side")] = 64,
    downsample: Annotated[int, typer.Option(help="pixels a side of one token")] = 8,
    width: Annotated[int, typer.Option(help="channels")] = 64,
    encoder_depth: Annotated[int, typer.Option(help="residual blocks of the encoder")] = 1,
    decoder_depth: Annotated[int, typer.Option(help="residual blocks of the decoder")] = 2,
    levels: Annotated[str, typer.Option(help="FSQ levels; their product is the codebook's size")] = "8,5,5,5",
    device: DeviceChoice = "auto",
    dtype: Annotated[Literal["fp32", "bf16"], typer.Option(help="of the computation")] = "fp32",
) -> None:
    """Train the FSQ image codec; reports PSNR and codebook use on the held-out split."""
    from megamm.codecs.image import ImageCodecConfig
    from megamm.codecs.train import ImageTraining, train_image_codec
    from megamm.device import DTYPES, choose

    _log_to_console()
    codec = ImageCodecConfig.of(
        None,
        image_size=image_size,
        downsample=downsample,
        width=width,
        encoder_depth=encoder_depth,
        decoder_depth=decoder_depth,
        levels=levels.split(","),
    )
    training = ImageTraining(codec, steps, batch_size, learning_rate, seed)
    report = train_image_codec(sources, to, training, choose(device).torch_device, DTYPES[dtype])
    print(f"{to}: {codec.grid_size**2} tokens an image of {codec.codebook_size} codes, PSNR {report.psnr_db:.2f} dB")


@data_app.command("fetch")
def fetch_sources(
    names: Annotated[list[str], typer.Argument(help="emoji, clipart")],
    to: Annotated[Path, typer.Option(help="folder for the raw data: RAW/<source>")],
) -> None:
    """Fetch public image-caption pairs from Debian packages (nothing is installed); what is there is kept."""
    from megamm.data.sources import fetch

    _log_to_console()
    for name in names:
        folder, pairs = fetch(name, to)
        print(f"{folder}: fetched already, kept" if pairs is None else f"{folder}: {pairs} pairs")


@data_app.command("build")
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

    _log_to_console()
    for report in build(raws, to, BuildOptions(heldout, max_broken, limit, image_size)):
        print(report.summary())
    print(f"{to}/report.json names every pair that was left out")


@data_app.command("index")
def index_shards(folder: Annotated[Path, typer.Argument(help="folder of 000000.tar, 000001.tar, ...")]) -> None:
    """(Re)build the indexes of a folder of WebDataset tars, one modality a folder."""
    from megamm.data.shard_index import write_index

    print(f"{folder}: {write_index(folder)} members indexed")


@data_app.command("tokenize")
def tokenize_shards(
    sources: Sources,
    codec: Annotated[list[str], typer.Option(help="modality=FOLDER, once a modality")],
    device: DeviceChoice = "auto",
) -> None:
    """Make the token caches of built shards; complete ones are kept."""
    from megamm.data.token_cache import load_codecs, tokenize
    from megamm.device import choose

    _log_to_console()
    for cache in tokenize(sources, load_codecs(codec, choose(device).torch_device)):
        kept = " (kept)" if cache.kept else ""
        print(f"{cache.folder}: {cache.samples} samples, {cache.tokens} tokens{kept}")


@convert_app.command("export")
def export_run(
    run: Annotated[Path, typer.Argument(help="a run's output folder, or one checkpoint")],
    out: Annotated[Path, typer.Argument(help="Hugging Face folder to make")],
) -> None:
    """Write safetensors, config, tokenizer and codecs that transformers' AutoModelForCausalLM loads."""
    from megamm.convert.hf import export

    _log_to_console()
    print(f"exported to {export(run, out)}")


@convert_app.command("import")
def import_export(
    folder: Annotated[Path, typer.Argument(help="a folder made by `megamm convert export`")],
    run: Annotated[Path, typer.Argument(help="output folder of a new run; it starts from these weights")],
) -> None:
    """Write step 0 of a new run from an export, weights bit for bit."""
    from megamm.convert.hf import import_

    _log_to_console()
    print(f"imported to {import_(folder, run)}")


@app.command("eval")
def evaluate_export(
    export: Annotated[Path, typer.Argument(help="a folder made by `megamm convert export`")],
    sources: Sources,
    limit: Annotated[int | None, typer.Option(help="held-out samples a source at most", min=1)] = None,
    seed: Annotated[int, typer.Option(help="of the shuffled partners")] = 0,
    run: Annotated[Path | None, typer.Option(help="also compare logits with this run's own model")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures there")] = None,
    device: DeviceChoice = "auto",
) -> None:
    """Held-out loss and pair gain (how much one part tells of the other) of an export, in stock transformers."""
    from megamm.convert.compare import logits_difference
    from megamm.convert.exported import open_export
    from megamm.device import choose
    from megamm.evaluate import evaluate, summary_lines

    _log_to_console()
    if json_file is not None and json_file.exists():
        raise UserError("the output exists", where=json_file, remedy="remove it or choose another")
    place = choose(device)
    figures = evaluate(open_export(export, place.torch_device), sources, limit=limit, seed=seed).to_json()
    print(*summary_lines(figures), sep="\n")
    if run is not None:
        figures["logits_max_abs_diff"] = logits_difference(run, export, place)
        print(f"logits: at most {figures['logits_max_abs_diff']:.1e} from the run's own model")
    if json_file is not None:
        partial = json_file.with_name(f".{json_file.name}.partial")
        partial.write_text(json.dumps(figures, indent=1) + "\n")
        partial.rename(json_file)


@app.command()
def generate(
    export: Annotated[Path, typer.Argument(help="a folder made by `megamm convert export`")],
    to: Annotated[str, typer.Option(help="modality to make: text, image")],
    prompt: Annotated[list[str] | None, typer.Option(help="text to start from; may be repeated")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="image to start from; may be repeated")] = None,
    out: Annotated[Path | None, typer.Option(help="file to write; for several inputs a folder")] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token")] = 1.0,
    top_k: Annotated[int, typer.Option(help="draw from so many tokens; 0 is off")] = 0,
    top_p: Annotated[float, typer.Option(help="draw from this share of the probability")] = 1.0,
    max_tokens: Annotated[int, typer.Option(help="of generated text")] = 64,
    seed: Annotated[int, typer.Option(help="item i is drawn with seed + i")] = 0,
    device: DeviceChoice = "auto",
) -> None:
    """Generate one modality from another: --prompt "a red heart" --to image --out heart.png."""
    from megamm.device import choose
    from megamm.generate import Medium, Sampling, generate_files

    _log_to_console()
    if bool(prompt) == bool(image):
        raise UserError("give either --prompt or --image", remedy="start from one modality")
    inputs = [Medium.of_prompt(p) for p in prompt or []] + [Medium.of_file(i) for i in image or []]
    sampling = Sampling(temperature, top_k, top_p, seed, max_tokens)
    source = "text" if prompt else "image"
    made = generate_files(export, inputs, source, to, out, sampling, choose(device).torch_device)
    print(*(made if out is None else [f"{out}: {len(made)} {to}"]), sep="\n")


@app.command()
def doctor() -> None:
    """What this machine and installation offer a run, and what is wrong; exit code 1 if something is."""
    from megamm.doctor import examine

    if not examine().show():
        raise typer.Exit(1)


def yaml_of(run: BaseModel) -> str:
    """A config as YAML, defaults filled in."""
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False)


def _log_to_console() -> None:
    """Our own log lines on rank 0, warnings of every rank; libraries only from warnings up."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("megamm").setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    warnings.simplefilter("ignore")


def main() -> None:
    """Entry point of the console script and of `python -m megamm`."""
    # Before torch is loaded. Threads that spin while they wait make training ten times slower where cores are shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except UserError as error:
        if not error.on_all_ranks or os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
