"""Trains the toy tokenizer on the scents of shards; reports the share of held-out letters that come back."""

from pathlib import Path

import torch
from torch import Tensor

from megamm.common.device import Device
from megamm.tokenizers.io import Split, new_folder, open_media, save_codec
from megamm.tokenizers.scent.model import LETTERS, ScentCodec, ScentCodecConfig
from megamm.tokenizers.training_loop import Figures, Training, train_codec


class _Letters:
    """All letters of a split, `[N]`, as training data."""

    def __init__(self, sources: list[Path], split: Split) -> None:
        media = [shards.read(i) for shards in open_media(sources, split, "scent") for i in range(len(shards))]
        self.letters = torch.tensor([LETTERS.index(letter) for letter in b"".join(media).decode()])

    def __len__(self) -> int:
        return len(self.letters)

    def batch(self, numbers: list[int], epoch: int) -> tuple[Tensor, ...]:
        return (self.letters[numbers],)


def train_scent_codec(sources: list[Path], target: Path, training: Training, device: Device) -> Figures:
    """Train, write the tokenizer folder, and return the last report."""
    train, heldout = _Letters(sources, "train"), _Letters(sources, "heldout").letters

    def report(codec: ScentCodec, step: int) -> Figures:
        return {"restored": (codec.decode(codec.encode(heldout)) == heldout).float().mean().item()}

    with new_folder(target) as folder:
        torch.manual_seed(training.seed)
        codec = ScentCodec(ScentCodecConfig())
        reports = train_codec(codec, train, training, device, report)
        save_codec(codec, folder)
    return reports[-1]
