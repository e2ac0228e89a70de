"""Writes the text of token caches as Megatron's .bin/.idx, for training with another Megatron-based program.

In: `SHARDS/<source>/<split>/text.tokens-<codec_id>/` of every source. Out: PREFIX.bin and PREFIX.idx. A sample is a
document, in the order of the shards; each text of a page is a sequence of its document. Samples with media have no such
form: they are an error, or left out and counted.
"""

import io
import logging
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np

from megamm.common.errors import UserError
from megamm.common.sample import IntArray
from megamm.modalities import REGISTRY
from megamm.shards.folder import UNNUMBERED, ShardFolder, tokens_from_bytes
from megamm.shards.indexed_dataset import IndexedTokensWriter

logger = logging.getLogger(__name__)

_UINT16 = "<u2"
_INT32 = "<i4"
"""Megatron has no uint32."""


@dataclass(frozen=True)
class ExportedBin:
    """What was written, in documents and tokens; skipped: samples with media, which were left out."""

    documents: int
    tokens: int
    dtype: str
    skipped: int


def export_bin(
    sources: list[Path],
    prefix: Path,
    split: str = "train",
    *,
    codec_id: str | None = None,
    end_token: int | None = None,
    skip_media: bool = False,
) -> ExportedBin:
    """Write the text documents of a split of all sources to PREFIX.bin and PREFIX.idx.

    codec_id: of the token cache, if there are several. end_token: id that is appended to every document. The ids are
    uint16 if all caches store them so, else int32. Raises UserError if a source has no such cache, or a sample has
    media and `skip_media` is false.
    """
    caches = [ShardFolder(_text_cache(source / split, codec_id)) for source in sources]
    names = {cache.folder.name for cache in caches}
    if len(names) > 1:
        what = f"the sources have token caches of different tokenizers: {', '.join(sorted(names))}"
        raise UserError(what, remedy="tokenize all of them with one tokenizer, or choose one with --codec-id")
    media = [_keys_with_media(source / split) for source in sources]
    for source, keys in zip(sources, media, strict=True):
        if keys and not skip_media:
            what = f"{len(keys)} samples have media, which .bin files cannot hold ({min(keys)}, ...)"
            raise UserError(what, where=source / split, remedy="give --skip-media to leave these samples out")
    dtype = _dtype(caches, end_token)
    with IndexedTokensWriter(prefix, dtype) as writer:
        for cache, keys in zip(caches, media, strict=True):
            for key, members in groupby(enumerate(cache.keys), key=itemgetter(1)):
                if key not in keys:
                    writer.add(_document(cache, [i for i, _ in members], end_token))
    skipped = sum(map(len, media))
    logger.info("%s: %d documents, %d tokens, %s", prefix, writer.documents, writer.tokens, np.dtype(dtype))
    return ExportedBin(writer.documents, writer.tokens, str(np.dtype(dtype)), skipped)


def _text_cache(folder: Path, codec_id: str | None) -> Path:
    """The token cache of the split's texts. Raises UserError if there is none, or more than one to choose from."""
    found = sorted(folder.glob(f"text.tokens-{codec_id or '*'}"))
    if not found:
        which = f"text tokens of codec {codec_id}" if codec_id else "text tokens"
        remedy = "give SHARDS/<source>, tokenized with `megamm data tokenize SHARDS/<source> --codec text=FOLDER`"
        raise UserError(f"no {which} in this split", where=folder, remedy=remedy)
    if len(found) > 1:
        ids = ", ".join(path.name.removeprefix("text.tokens-") for path in found)
        raise UserError(f"text tokens of several tokenizers: {ids}", where=folder, remedy="choose one with --codec-id")
    return found[0]


def _keys_with_media(folder: Path) -> set[str]:
    """The keys of the samples of a split that have a part which is not text."""
    media = [name for name in REGISTRY if name != "text"]
    folders = [path for name in media for path in (folder / name, *folder.glob(f"{name}.tokens-*")) if path.is_dir()]
    return {key for path in folders for key in ShardFolder(path).keys}


def _dtype(caches: list[ShardFolder], end_token: int | None) -> str:
    """Dtype of the ids. Raises UserError if it cannot hold the end token."""
    # All members of a cache have the dtype that its tokenizer's vocabulary needs.
    stored = {_stored_dtype(cache.read(0)) for cache in caches if len(cache)}
    dtype = _UINT16 if stored <= {np.dtype(np.uint16)} else _INT32
    if end_token is not None and not 0 <= end_token <= np.iinfo(dtype).max:
        what = f"--end-token {end_token} is not an id of this token cache, which has ids up to {np.iinfo(dtype).max}"
        raise UserError(what, remedy="give the id of the tokenizer's end-of-text token")
    return dtype


def _stored_dtype(data: bytes) -> np.dtype:
    return np.load(io.BytesIO(data), allow_pickle=False).dtype


def _document(cache: ShardFolder, members: list[int], end_token: int | None) -> list[IntArray]:
    """The ids of a sample's texts, in reading order."""
    numbers = sorted((int(cache.parts[i]), i) for i in members)
    if [number for number, _ in numbers] not in ([UNNUMBERED], list(range(len(members)))):
        what = f"the texts of {cache.keys[members[0]]!r} are not numbered 0, 1, 2 ..."
        raise UserError(what, where=cache.folder, remedy="build this source again with `megamm data build`")
    sequences = [tokens_from_bytes(cache.read(i)) for _, i in numbers]
    if end_token is not None:
        sequences[-1] = np.append(sequences[-1], end_token)
    return sequences
