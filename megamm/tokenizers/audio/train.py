"""Trains the audio codec on random crops of the clips; the loss is the mean absolute error of the log-mel.

Reads the train split; reports figures (tokenizers/audio/metrics.py) on about `heldout_seconds` of the held-out split.
"""

import json
import logging
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megamm.common.device import Device
from megamm.common.errors import UnreadableMedia, UserError
from megamm.media.sound_file import Waveform, read_waveform
from megamm.media.text_file import to_text
from megamm.shards.folder import ShardFolder
from megamm.tokenizers.audio.metrics import TranscribedClip, evaluate, evaluate_waveforms, words
from megamm.tokenizers.audio.model import AudioCodec, AudioCodecConfig
from megamm.tokenizers.io import Split, new_folder, open_media, save_codec
from megamm.tokenizers.training_loop import Figures, Training, train_codec, warn_of_collapse

logger = logging.getLogger(__name__)

MAX_CLIPS = 10_000
"""More clips are thinned evenly: clips are kept in memory, 64 kB per second at 16 kHz."""


class Crops:
    """Training crops `[crop]` of the clips: one per started `crop` samples, at a new random offset each epoch."""

    def __init__(self, waveforms: list[Waveform], crop: int) -> None:
        self.waveforms, self.crop = waveforms, crop
        self.clip_of = [i for i, waveform in enumerate(waveforms) for _ in range(-(-len(waveform) // crop))]

    def __len__(self) -> int:
        return len(self.clip_of)

    def batch(self, numbers: list[int], epoch: int) -> tuple[Tensor, ...]:
        """float32 `[B, crop]`; a shorter clip is padded with zeros."""
        crops = np.zeros((len(numbers), self.crop), dtype=np.float32)
        for row, number in zip(crops, numbers, strict=True):
            waveform = self.waveforms[self.clip_of[number]]
            # Seeded by number and epoch: a crop does not depend on the rank or the batch it is in.
            room = max(0, len(waveform) - self.crop)
            start = int(np.random.default_rng((number, epoch)).integers(room + 1))
            piece = waveform[start : start + self.crop]
            row[: len(piece)] = piece
        return (torch.from_numpy(crops),)


def train_audio_codec(
    sources: list[Path],
    target: Path,
    config: AudioCodecConfig,
    training: Training,
    device: Device,
    dtype: torch.dtype = torch.float32,
    *,
    crop_seconds: float,
    heldout_seconds: float,
) -> Figures:
    """Train on `sources` and write the codec folder `target`, with training.json; returns the last report.

    Crops are rounded to whole latent frames. Raises UserError if there is no sound or the target exists.
    """
    crop = max(1, round(crop_seconds * config.sample_rate / config.frame_samples)) * config.frame_samples
    with new_folder(target) as folder:
        data = Crops([clip.waveform for clip in read_clips(sources, "train", config)], crop)
        heldout = read_clips(sources, "heldout", config, heldout_seconds)
        hours = sum(map(len, data.waveforms)) / config.sample_rate / 3600
        seconds = sum(len(clip.waveform) for clip in heldout) / config.sample_rate
        logger.info("%d clips (%.2f h) to train on, %.0f s held out", len(data.waveforms), hours, seconds)
        torch.manual_seed(training.seed)
        codec = AudioCodec(config)
        reports = train_codec(codec, data, training, device, lambda _, step: evaluate(codec, heldout), dtype)
        save_codec(codec, folder)
        if reports:  # only on the first rank
            reports[-1] |= evaluate_waveforms(codec, heldout)
        record = asdict(training) | {
            "crop_seconds": crop / config.sample_rate,
            "train_clips": len(data.waveforms),
            "train_hours": hours,
            "heldout_seconds": seconds,
            "heldout": reports,
        }
        (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    if not reports:
        return {}
    frames = sum(-(-len(clip.waveform) // config.frame_samples) for clip in heldout)
    for level in range(config.codebooks):
        warn_of_collapse(reports[-1][f"codes_used_{level}"], config.codebook_size, frames, f"codebook {level}")
    return reports[-1]


def read_clips(
    sources: list[Path], split: Split, config: AudioCodecConfig, seconds: float = math.inf
) -> list[TranscribedClip]:
    """The clips of a split, at most MAX_CLIPS, in a fixed random order, until they reach `seconds` in total.

    Raises UserError for an unreadable clip.
    """
    members = [(shards, i) for shards in open_media(sources, split, "audio") for i in range(len(shards))]
    texts = _texts(sources, split)
    count = min(len(members), MAX_CLIPS)
    clips: list[TranscribedClip] = []
    read = 0.0
    # A fixed random order, so that `seconds` of held-out clips come from all sources.
    for chosen in np.random.default_rng(0).permutation(count).tolist():
        if read >= seconds:
            break
        shards, i = members[chosen * len(members) // count]
        try:
            waveform = read_waveform(shards.read(i), shards.extensions[i], config.sample_rate, config.max_seconds)
        except UnreadableMedia as error:
            remedy = "rebuild these shards with `megamm data build`, which skips such samples"
            raise UserError(f"sample {shards.keys[i]}: {error}", where=shards.folder, remedy=remedy) from error
        whole = len(waveform) < round(config.max_seconds * config.sample_rate)  # otherwise truncated: no transcript
        said = texts.get((shards.folder.parent, shards.keys[i]), "") if whole and shards.index.number_of(i) < 0 else ""
        clips.append(TranscribedClip(waveform, said))
        read += len(waveform) / config.sample_rate
    return clips


def _texts(sources: list[Path], split: Split) -> dict[tuple[Path, str], str]:
    """(folder of the split, key) -> words of the sample's text, for samples that are not interleaved."""
    texts = {}
    for source in sources:
        folder = source / split
        if not (folder / "text").is_dir():
            continue
        shards = ShardFolder(folder / "text")
        for i in range(len(shards)):
            if shards.index.number_of(i) < 0:
                texts[folder, shards.keys[i]] = words(to_text(shards.read(i)))
    return texts
