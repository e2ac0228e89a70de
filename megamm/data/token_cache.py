"""Token caches: media shards through a codec, once, so that training never touches media.

In: `SHARDS/<source>/<split>/<modality>/`. Out, beside it: `<modality>.tokens-<codec_id>/`, shards of `.npy` ids
`[T]` with the same keys in the same order and the same number of samples a tar, the index with each length T.
Deterministic: the same media and codec give the same bytes. A complete cache is kept, a new codec makes a new one.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megamm.data.shards import UNNUMBERED, ShardFolder, ShardWriter
from megamm.data.tokens import tokens_to_bytes
from megamm.errors import UserError
from megamm.modalities import REGISTRY, families
from megamm.modalities.base import Modality, UnreadableMedia

logger = logging.getLogger(__name__)

SPLITS = ("train", "heldout")
BATCH = 256
"""Samples in one call of `Modality.encode`."""


@dataclass(frozen=True)
class Cache:
    """One token cache: its folder, what it holds, and whether it was there already."""

    folder: Path
    samples: int
    tokens: int
    kept: bool


def cache_name(modality: Modality) -> str:
    """Folder name of a modality's cache, beside the folder of its media."""
    return f"{modality.name}.tokens-{modality.codec_id}"


def load_codecs(codecs: list[str], device: torch.device) -> list[Modality]:
    """From `family=FOLDER` each: all modalities of these families. UserError if one has another form or no codec."""
    loaded = []
    for codec in codecs:
        family, separator, folder = codec.partition("=")
        if not separator or family not in families():
            remedy = f"write NAME=FOLDER, with a name of {', '.join(families())}"
            raise UserError(f"unknown codec {codec!r}", remedy=remedy)
        loaded += [m.load(Path(folder), device) for m in REGISTRY.values() if m.family == family]
    return loaded


def tokenize(sources: list[Path], modalities: list[Modality]) -> list[Cache]:
    """Make the caches of every split of every source that has the modality.

    UserError if a codec has nothing to do, a sample cannot be read, or an existing cache holds other samples.
    """
    media = [
        (s / split / modality.name, modality)
        for modality in modalities
        for s in sources
        for split in SPLITS
        if (s / split / modality.name).is_dir()
    ]
    for family in dict.fromkeys(modality.family for modality in modalities):
        if not any(modality.family == family for _, modality in media):
            where = ", ".join(map(str, sources)) or None
            remedy = "name source folders made by `megamm data build` (SHARDS/<source>), or leave that --codec out"
            raise UserError(f"no {family} shards", where=where, remedy=remedy)
    return [_tokenize_folder(folder, modality) for folder, modality in media]


def _tokenize_folder(media: Path, modality: Modality) -> Cache:
    shards, target = ShardFolder(media), media.parent / cache_name(modality)
    if target.exists():
        return _kept(target, shards)
    total = 0
    with ShardWriter(target, samples_per_shard=_samples_per_shard(media)) as writer:
        for start in range(0, len(shards), BATCH):
            numbers = range(start, min(start + BATCH, len(shards)))
            ids = modality.encode(list(_read_media(shards, numbers, modality)))
            for i, ids_T in zip(numbers, ids, strict=True):
                data = tokens_to_bytes(ids_T, modality.vocabulary_size)
                number = "" if shards.parts[i] == UNNUMBERED else f"{shards.parts[i]}."
                writer.add(shards.keys[i], f"{number}npy", data, tokens=len(ids_T))
                total += len(ids_T)
    logger.info("%s: %d samples, %d tokens", target, len(shards), total)
    return Cache(target, len(shards), total, kept=False)


def _read_media(shards: ShardFolder, numbers: range, modality: Modality) -> Iterator[Any]:
    for i in numbers:
        try:
            yield modality.read_media(shards.read(i), shards.extensions[i])
        except UnreadableMedia as error:
            remedy = "rebuild these shards with `megamm data build`, which leaves such samples out"
            raise UserError(f"sample {shards.keys[i]}: {error}", where=shards.folder, remedy=remedy) from error


def _kept(target: Path, shards: ShardFolder) -> Cache:
    cache = ShardFolder(target)
    is_whole = cache.keys == shards.keys and cache.parts.tolist() == shards.parts.tolist()
    if not is_whole or (cache.tokens is None and len(cache)):
        what = f"the token cache does not hold the samples of {shards.folder.name}/"
        raise UserError(what, where=target, remedy="delete the cache and run `megamm data tokenize` again")
    tokens = 0 if cache.tokens is None else int(cache.tokens.sum())
    logger.info("%s: kept, %d samples", target, len(cache))
    return Cache(target, len(cache), tokens, kept=True)


def _samples_per_shard(media: Path) -> int:
    """Samples in the first tar; every tar of a ShardWriter but the last has as many."""
    with open(media / "000000.jsonl", encoding="utf-8") as index:
        return max(1, sum(1 for _ in index))
