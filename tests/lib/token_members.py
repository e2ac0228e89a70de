"""Token caches with given ids, for data sets without a codec."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megamm.shards.folder import ShardWriter, tokens_to_bytes

CODECS = {"text": "t", "image": "i", "audio": "a"}
"""Modality -> codec_id."""

Member = tuple[str, str, int | None, list[int]]
"""Modality, key, part number or None, ids."""


def write(split: Path, members: Sequence[Member]) -> Path:
    """Write token caches of the members."""
    for modality, codec in CODECS.items():
        with ShardWriter(split / f"{modality}.tokens-{codec}", samples_per_shard=3) as writer:
            for name, key, number, ids in members:
                if name == modality:
                    ext = "npy" if number is None else f"{number}.npy"
                    writer.add(key, ext, tokens_to_bytes(np.array(ids), 1000), tokens=len(ids))
    return split


def page(key: str, parts: Sequence[tuple[str, list[int]]]) -> list[Member]:
    """The members of an interleaved page."""
    return [(modality, key, number, ids) for number, (modality, ids) in enumerate(parts)]
