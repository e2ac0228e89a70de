"""A tiny real data set and config: drawn images with captions, built, tokenized and ready for training."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import shared
import torch
import warm
import yaml
from PIL import Image, ImageDraw
from warm import ROOT as ROOT
from warm import environment

from megamm.data.build.shards import BuildOptions, build
from megamm.data.tokenize.token_cache import load_codecs, tokenize
from megamm.observability import metrics
from megamm.tokenizers.io import save_codec
from megamm.tokenizers.text.train import train_text_tokenizer
from megamm.tokenizers.visual.model import VisualCodec, VisualCodecConfig

COLOURS = ("red", "green", "blue", "black", "orange", "purple")
NOUNS = ("box", "ball", "house", "tree", "boat", "star", "fish", "lamp", "door", "bell", "kite", "drum")


def make_data(folder: Path) -> None:
    """Write folder/shards/drawn (train, heldout) with token caches, and folder/tokenizers/{text,visual} (untrained)."""
    shared.copy("tiny-data", _build_data, folder)


def _build_data(folder: Path) -> None:
    raw = folder / "raw" / "drawn"
    raw.mkdir(parents=True)
    with (raw / "samples.jsonl").open("w") as pairs:
        for c, colour in enumerate(COLOURS):
            for n, noun in enumerate(NOUNS):
                image = Image.new("RGB", (24, 24), "white")
                ImageDraw.Draw(image).rectangle((n % 6, c, 8 + n, 12 + c), fill=colour)
                image.save(raw / f"{c}_{n}.png")
                pairs.write(json.dumps({"image": f"{c}_{n}.png", "caption": f"a {colour} {noun}", "noun": noun}) + "\n")
    build([raw], folder / "shards", BuildOptions(heldout=0.2, image_size=24), workers=1)
    source = folder / "shards" / "drawn"
    train_text_tokenizer([source], folder / "tokenizers" / "text", vocabulary_size=300)
    torch.manual_seed(0)
    codec = folder / "tokenizers" / "visual"
    codec.mkdir()
    save_codec(VisualCodec(VisualCodecConfig(image_size=24, downsample=8, width=16, levels=(5, 5))), codec)
    codecs = [f"{name}={folder / 'tokenizers' / name}" for name in ("text", "visual")]
    tokenize([source], load_codecs(codecs, torch.device("cpu")))


def write_config(folder: Path, output: Path, **sections: dict[str, Any]) -> Path:
    """Write a config over make_data's folder; `sections` update the sections of the same name."""
    config: dict[str, Any] = {
        "output": str(output),
        "device": "cpu",
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "ffn_hidden_size": 64,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "head_dim": 8,
        },
        "data": {"seq_length": 64, "sources": [{"path": str(folder / "shards" / "drawn")}]},
        "tokenizers": {name: str(folder / "tokenizers" / name) for name in ("text", "visual")},
        "optimizer": {"lr": 3e-3, "warmup_steps": 2},
        "train": {"steps": 8, "global_batch_size": 4, "micro_batch_size": 1, "log_every": 1},
        "checkpoint": {"every": 2, "keep": 4},
    }
    for name, section in sections.items():
        config[name] = config.get(name, {}) | section
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    return path


TIMES = (
    *("tokens_per_s", "seconds_left", "data_wait_share", "data_wait_seconds", "step_seconds", "evaluation_seconds"),
    *("checkpoint_stall_seconds", "time", "goodput", "restarts", "heartbeat_age", "steps", "mfu"),
    "flops_per_s_per_device",
)
"""Keys of a metrics line that differ in every run."""


def numbers(run: Path) -> list[dict[str, Any]]:
    """Return every reported value but the timings, to the last digit (JSON keeps all): equality is bit-identity."""
    lines = metrics.read_lines(run)
    return [{k: v for k, v in line.items() if k not in TIMES and not k.startswith("straggler/")} for line in lines]


def megamm(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line in a separate process."""
    command = [sys.executable, "-m", "megamm", *map(str, arguments)]
    return warm.run(command, env=environment(), capture_output=True, text=True, timeout=300, **options)
