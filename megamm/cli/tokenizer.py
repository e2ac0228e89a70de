"""`megamm tokenizer train NAME`: train the tokenizers, each with its own size options."""

import sys
from typing import Annotated

import typer

from megamm.cli.common import DeviceChoice, Precision, Sources, Target
from megamm.common.log import log_to_console

app = typer.Typer(no_args_is_help=True, help="Train the tokenizers of the modalities.")
train_app = typer.Typer(no_args_is_help=True, help="Train a tokenizer on the train split of built shards.")
app.add_typer(train_app, name="train")

Processes = Annotated[int, typer.Option("--nproc", help="number of local processes", min=1)]


def started(processes: int) -> bool:
    """Run this command in `processes` ranks and return True; return False if this process should do the work itself."""
    from megamm.elastic import torchrun

    torchrun.check_environment(processes, 1, "--nproc")
    if processes == 1 or torchrun.is_rank():
        return False
    # Each rank runs the same command line, and does the work.
    torchrun.launch(sys.argv[1:], processes)
    return True


@train_app.command("text")
def train_text(
    sources: Sources,
    to: Target,
    vocabulary: Annotated[int, typer.Option(help="number of tokens, at least 256")] = 4096,
) -> None:
    """Train a byte-level BPE tokenizer; its folder also loads in transformers."""
    from megamm.tokenizers.text.train import train_text_tokenizer

    log_to_console()
    done = train_text_tokenizer(sources, to, vocabulary_size=vocabulary)
    print(f"{to}: {done['vocabulary_size']} tokens, {done['bytes_per_token']:.2f} bytes per token on held-out text")


@train_app.command("visual")
def train_visual(
    sources: Sources,
    to: Target,
    steps: int = 1500,
    batch_size: Annotated[int, typer.Option(help="images and clips per step, over all ranks")] = 32,
    learning_rate: float = 4e-3,
    seed: int = 0,
    image_size: Annotated[int, typer.Option(help="pixels per side")] = 64,
    downsample: Annotated[int, typer.Option(help="pixels per side of one token")] = 8,
    frames_per_step: Annotated[int, typer.Option(help="frames of video in one latent frame")] = 4,
    frame_rate: Annotated[float, typer.Option(help="video frames per second that are sampled")] = 8.0,
    max_frames: Annotated[int, typer.Option(help="most frames of a video; the rest is skipped")] = 17,
    width: Annotated[int, typer.Option(help="channels")] = 64,
    encoder_depth: Annotated[int, typer.Option(help="residual blocks of the encoder, and temporal ones")] = 1,
    decoder_depth: Annotated[int, typer.Option(help="residual blocks of the decoder, and temporal ones")] = 2,
    levels: Annotated[str, typer.Option(help="FSQ levels; their product is the codebook's size")] = "8,5,5,5",
    clip_share: Annotated[float, typer.Option(help="share of clips in a batch, if there are images too")] = 0.125,
    clip_frames: Annotated[int, typer.Option(help="most frames of a training clip")] = 9,
    device: DeviceChoice = "auto",
    dtype: Precision = "fp32",
    nproc: Processes = 1,
) -> None:
    """Train the FSQ tokenizer of images and videos; reports PSNR, SSIM and codebook use on the held-out split."""
    if started(nproc):
        return
    from megamm.common.device import DTYPES, choose
    from megamm.tokenizers.io import checked_config
    from megamm.tokenizers.training_loop import Training
    from megamm.tokenizers.visual.model import VisualCodecConfig
    from megamm.tokenizers.visual.train import ClipMix, train_visual_codec

    log_to_console()
    values = {
        "image_size": image_size,
        "downsample": downsample,
        "frames_per_step": frames_per_step,
        "frame_rate": frame_rate,
        "max_frames": max_frames,
        "width": width,
        "encoder_depth": encoder_depth,
        "decoder_depth": decoder_depth,
        "levels": levels.split(","),
    }
    codec = checked_config(VisualCodecConfig, values)
    training = Training(steps, batch_size, learning_rate, seed)
    mix = ClipMix(clip_share, clip_frames)
    report = train_visual_codec(sources, to, codec, training, choose(device), DTYPES[dtype], mix)
    if report:
        print(f"{to}: {codec.grid_size**2} tokens per image or latent frame, {codec.codebook_size} codes")
        print(*(f"{name} {value:.4g}" for name, value in report.items() if name != "step"), sep=", ")


@train_app.command("audio")
def train_audio(
    sources: Sources,
    to: Target,
    steps: int = 1800,
    batch_size: int = 8,
    learning_rate: float = 4e-3,
    seed: int = 0,
    sample_rate: Annotated[int, typer.Option(help="Hz")] = 16_000,
    hop: Annotated[int, typer.Option(help="samples from one mel frame to the next")] = 200,
    stride: Annotated[int, typer.Option(help="mel frames per latent frame")] = 4,
    codebooks: Annotated[int, typer.Option(help="tokens per latent frame: levels of the residual quantiser")] = 4,
    levels: Annotated[str, typer.Option(help="FSQ levels; their product is the size of each codebook")] = "8,5,5,5",
    width: Annotated[int, typer.Option(help="channels")] = 192,
    encoder_depth: Annotated[int, typer.Option(help="blocks of the encoder")] = 1,
    decoder_depth: Annotated[int, typer.Option(help="blocks of the decoder")] = 2,
    max_seconds: Annotated[float, typer.Option(help="length of a clip that is read")] = 20.0,
    crop_seconds: Annotated[float, typer.Option(help="length of the training crops")] = 1.6,
    heldout_seconds: Annotated[float, typer.Option(help="held-out audio used for the report")] = 60.0,
    device: DeviceChoice = "auto",
    dtype: Precision = "fp32",
    nproc: Processes = 1,
) -> None:
    """Train the residual FSQ tokenizer of audio; reports mel distance and word error on the held-out split."""
    if started(nproc):
        return
    from megamm.common.device import DTYPES, choose
    from megamm.tokenizers.audio.model import KIND, AudioCodecConfig
    from megamm.tokenizers.audio.train import train_audio_codec
    from megamm.tokenizers.io import checked_config
    from megamm.tokenizers.training_loop import Training

    log_to_console()
    values = {
        "kind": KIND,
        "sample_rate": sample_rate,
        "hop": hop,
        "stride": stride,
        "codebooks": codebooks,
        "levels": levels.split(","),
        "width": width,
        "encoder_depth": encoder_depth,
        "decoder_depth": decoder_depth,
        "max_seconds": max_seconds,
    }
    codec = checked_config(AudioCodecConfig, values)
    training = Training(steps, batch_size, learning_rate, seed)
    lengths = {"crop_seconds": crop_seconds, "heldout_seconds": heldout_seconds}
    report = train_audio_codec(sources, to, codec, training, choose(device), DTYPES[dtype], **lengths)
    if report:
        rate = codec.codebooks * codec.sample_rate / codec.frame_samples
        heard = "not measured"
        if "word_error" in report:
            heard = f"{report['word_error']:.1%} (originals: {report['word_error_of_originals']:.1%})"
        print(f"{to}: {rate:.0f} tokens per second, mel distance {report['mel_db']:.2f} dB, word error {heard}")


@train_app.command("points")
def train_points(
    sources: Sources,
    to: Target,
    steps: int = 600,
    batch_size: int = 8,
    learning_rate: float = 2e-3,
    seed: int = 0,
    points: Annotated[int, typer.Option(help="points of a cloud, input and output")] = 2048,
    patches: Annotated[int, typer.Option(help="number of patches, a power of two; each is two tokens")] = 64,
    cells: Annotated[int, typer.Option(help="positions of a patch along each axis")] = 16,
    width: Annotated[int, typer.Option(help="channels")] = 128,
    encoder_depth: Annotated[int, typer.Option(help="transformer layers of the encoder")] = 1,
    decoder_depth: Annotated[int, typer.Option(help="transformer layers of the decoder")] = 2,
    levels: Annotated[str, typer.Option(help="FSQ levels; their product is the number of shapes")] = "8,5,5,5",
    colour_weight: Annotated[float, typer.Option(help="weight of colours in the training loss; shapes have 4")] = 1.0,
    device: DeviceChoice = "auto",
    dtype: Precision = "fp32",
    nproc: Processes = 1,
) -> None:
    """Train the FSQ tokenizer of points; reports Chamfer distance and codebook use on the held-out split."""
    if started(nproc):
        return
    from megamm.common.device import DTYPES, choose
    from megamm.tokenizers.io import checked_config
    from megamm.tokenizers.points.model import KIND, PointsCodecConfig
    from megamm.tokenizers.points.train import train_points_codec
    from megamm.tokenizers.training_loop import Training

    log_to_console()
    values = {
        "kind": KIND,
        "points": points,
        "patches": patches,
        "cells": cells,
        "width": width,
        "encoder_depth": encoder_depth,
        "decoder_depth": decoder_depth,
        "levels": levels.split(","),
        "colour_weight": colour_weight,
    }
    codec = checked_config(PointsCodecConfig, values)
    training = Training(steps, batch_size, learning_rate, seed)
    report = train_points_codec(sources, to, codec, training, choose(device), DTYPES[dtype])
    if report:
        size = f"{2 * codec.patches} tokens per cloud, {codec.cell_count} cells and {codec.codebook_size} shapes"
        floor = f"{report['floor_chamfer']:.4f}" if "floor_chamfer" in report else "not known"
        print(f"{to}: {size}, Chamfer distance {report['chamfer']:.4f} (of two drawings: {floor})")
