"""Token caches: media shards are tokenised by a codec once, so that training reads no media.

In: `SHARDS/<source>/<split>/<modality>/`. Out, beside it: `<modality>.tokens-<codec_id>/`, shards of `.npy` ids `[T]`
with the same keys in the same order and the same number of samples per tar; the index has each length T.
Deterministic: the same media and codec give the same bytes. Complete caches are kept; a new codec creates a new one.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from megamm.common.errors import UserError
from megamm.data.tokenize.media_batches import Decoding, MediaBatches, VideoReading, member_name
from megamm.modalities import REGISTRY, tokenizer_names
from megamm.modalities.protocol import Modality
from megamm.shards.folder import SPLITS, ShardFolder, ShardWriter, tokens_to_bytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cache:
    """One token cache: its folder, its contents, and whether it existed before."""

    folder: Path
    samples: int
    tokens: int
    kept: bool


def cache_name(modality: Modality) -> str:
    """Folder name of a modality's cache, beside the folder of its media."""
    return f"{modality.name}.tokens-{modality.codec_id}"


def load_codecs(codecs: list[str], device: torch.device) -> list[Modality]:
    """All modalities of the tokenizers given as `NAME=FOLDER`. UserError for another form or a missing folder."""
    loaded = []
    for codec in codecs:
        name, separator, folder = codec.partition("=")
        if not separator or name not in tokenizer_names():
            remedy = f"use NAME=FOLDER, where NAME is one of {', '.join(tokenizer_names())}"
            raise UserError(f"unknown tokenizer {codec!r}", remedy=remedy)
        loaded += [m.load(Path(folder), device) for m in REGISTRY.values() if m.tokenizer_name == name]
    return loaded


def tokenize(sources: list[Path], modalities: list[Modality], reading: VideoReading | None = None) -> list[Cache]:
    """Create the caches of every split of every source that has the modality; reading: how videos are decoded.

    Raises UserError if a codec has nothing to do, a sample is unreadable, or an existing cache has other samples or
    was made with another decoder than requested.
    """
    reading = reading or VideoReading()
    media = [
        (s / split / modality.name, modality)
        for modality in modalities
        for s in sources
        for split in SPLITS
        if (s / split / modality.name).is_dir()
    ]
    # One tokenizer can serve several modalities (image and video): it is enough that one has data.
    for name in dict.fromkeys(modality.tokenizer_name for modality in modalities):
        if not any(modality.tokenizer_name == name for _, modality in media):
            where = ", ".join(map(str, sources)) or None
            remedy = "give source folders made by `megamm data build` (SHARDS/<source>), or remove that --codec"
            raise UserError(f"no {name} shards", where=where, remedy=remedy)
    return [_tokenize_folder(folder, modality, reading) for folder, modality in media]


def _tokenize_folder(media: Path, modality: Modality, reading: VideoReading) -> Cache:
    """Create the cache of one folder of media, or check the existing one."""
    shards, target = ShardFolder(media), media.parent / cache_name(modality)
    if target.exists():
        return _kept(target, shards, reading)
    samples, total = 0, 0
    batches = MediaBatches(shards, modality, reading)
    with ShardWriter(target, samples_per_shard=_samples_per_shard(shards)) as writer:
        for numbers, inputs in batches:
            for i, ids_T in zip(numbers, modality.encode(inputs), strict=True):
                data = tokens_to_bytes(ids_T, modality.vocabulary_size)
                # The member's name is that of the media, with the extension npy: the keys of the folders stay aligned.
                number = member_name(shards, i).removeprefix(shards.keys[i]).removeprefix(".")
                writer.add(shards.keys[i], f"{number}.npy".removeprefix("."), data, tokens=len(ids_T))
                samples, total = samples + 1, total + len(ids_T)
        # Written into the partial folder, so it appears together with the tokens.
        if batches.decoding:
            batches.decoding.write(writer.partial)
    logger.info("%s: %d samples, %d tokens", target, samples, total)
    return Cache(target, samples, total, kept=False)


def _kept(target: Path, shards: ShardFolder, reading: VideoReading) -> Cache:
    """The existing cache. Raises UserError if it does not match the media or the requested decoder."""
    cache, decoding = ShardFolder(target), Decoding.read(target) or Decoding()
    names = [member_name(shards, i) for i in range(len(shards))]
    # The same names in the same order: media that were added, removed or reordered do not match.
    is_whole = [member_name(cache, i) for i in range(len(cache))] == [n for n in names if n not in decoding.broken]
    remedy = "delete the cache and run `megamm data tokenize` again"
    if not is_whole or (cache.tokens is None and len(cache)):
        what = f"the token cache does not match the samples of {shards.folder.name}/"
        raise UserError(what, where=target, remedy=remedy)
    # Pixels differ a little between decoders, so an explicit choice must hold for an existing cache too.
    if reading.decoder != "auto" and decoding.decoders and reading.decoder not in decoding.decoders:
        raise UserError(
            f"decoded with {', '.join(decoding.decoders)}, not {reading.decoder}", where=target, remedy=remedy
        )
    tokens = cache.index.total_tokens
    logger.info("%s: already complete, %d samples", target, len(cache))
    return Cache(target, len(cache), tokens, kept=True)


def _samples_per_shard(media: ShardFolder) -> int:
    """Members in the first tar; every tar of a ShardWriter except the last has the same number."""
    return max(1, int(media.index.first[1]))
