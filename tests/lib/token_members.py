"""Token caches with given ids, for data sets without a codec."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megamm.shards.folder import ShardWriter, tokens_to_bytes

CODECS = {"text": "t", "image": "i", "audio": "a"}
"""Modality -> codec_id."""

Member = tuple[str, str, int | None, list[int]]
"""Modality, key, part number or None, ids."""


def write(split: Path, members: Sequence[Member], samples_per_shard: int = 3) -> Path:
    """Write token caches of the members."""
    for modality, codec in CODECS.items():
        with ShardWriter(split / f"{modality}.tokens-{codec}", samples_per_shard=samples_per_shard) as writer:
            for name, key, number, ids in members:
                if name == modality:
                    ext = "npy" if number is None else f"{number}.npy"
                    writer.add(key, ext, tokens_to_bytes(np.array(ids), 1000), tokens=len(ids))
    return split


def page(key: str, parts: Sequence[tuple[str, list[int]]]) -> list[Member]:
    """The members of an interleaved page."""
    return [(modality, key, number, ids) for number, (modality, ids) in enumerate(parts)]


def random_members(seed: int, *, is_aligned: bool) -> list[Member]:
    """Return samples of random parts: pairs, or all kinds of samples, among them pages."""
    rng, made = np.random.default_rng(seed), list[Member]()
    for i in range(60):
        key, size = f"k{rng.integers(1000)}-{i}", rng.integers(1, 140, 4).tolist()
        if is_aligned:
            made += [("text", key, None, [i] * size[0]), ("image", key, None, [2] * 9), ("audio", key, None, [3] * 5)]
        elif i % 3 == 0:
            made += page(key, [("text", [i] * size[0]), ("image", [1] * size[1]), ("text", [7] * size[2])])
        else:
            made += [(name, key, None, [i] * n) for name, n in zip(CODECS, size, strict=False) if rng.random() < 0.7]
    return made
