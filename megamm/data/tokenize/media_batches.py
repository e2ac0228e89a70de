"""The media of a folder of shards in batches for codecs: videos through a VideoStream, other media one by one.

A video's pixels, and so its tokens, depend a little on the decoder (docs/video.md). So the decoder is recorded with the
tokens, and so are skipped videos: `decoding.json`, {"decoders": {"dali": clips, "pyav": clips}, "broken": {name: why}}.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megamm.common.errors import UnreadableMedia, UserError
from megamm.media.video_stream import BrokenClip, Clip, VideoStream, choose_decoder
from megamm.modalities.protocol import Modality
from megamm.modalities.video import VideoModality
from megamm.shards.folder import UNNUMBERED, ShardFolder

BATCH, VIDEO_BATCH = 256, 32
"""Samples in one call of `Modality.encode`."""
RECORD = "decoding.json"


@dataclass(frozen=True)
class VideoReading:
    """The video decoder ("auto": DALI on a GPU, otherwise PyAV), and the allowed share of broken videos in a folder."""

    decoder: Literal["auto", "dali", "pyav"] = "auto"
    max_broken: float = 0.0


@dataclass
class Decoding:
    """Videos of a folder per decoder, and the skipped members with reasons (by name, "key" or "key.3")."""

    decoders: dict[str, int] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write `decoding.json`."""
        (folder / RECORD).write_text(json.dumps(self.__dict__, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Decoding | None":
        """Read what `write` wrote; None if the folder has none. Raises UserError if it is damaged."""
        if not (folder / RECORD).is_file():
            return None
        try:
            return cls(**json.loads((folder / RECORD).read_text()))
        except (ValueError, TypeError) as error:
            remedy = "delete the cache and run `megamm data tokenize` again"
            raise UserError(f"unreadable {RECORD}: {error}", where=folder, remedy=remedy) from error


def member_name(shards: ShardFolder, i: int) -> str:
    """Key of member i, with its part's number if it has one."""
    number = shards.index.number_of(i)
    return shards.keys[i] if number == UNNUMBERED else f"{shards.keys[i]}.{number}"


class MediaBatches:
    """Iterates over (member numbers, codec inputs) of a folder. `decoding` is complete afterwards; None without videos.

    Raises UserError if a sample is unreadable; for videos, if more than `max_broken` are, or one in a document.
    """

    def __init__(self, shards: ShardFolder, modality: Modality, reading: VideoReading) -> None:
        self._shards, self._modality, self._reading = shards, modality, reading
        self.decoding = Decoding() if isinstance(modality, VideoModality) else None

    def __iter__(self) -> Iterator[tuple[list[int], list[Any]]]:
        if isinstance(self._modality, VideoModality):
            yield from self._videos(self._modality)
            return
        for start in range(0, len(self._shards), BATCH):
            numbers = list(range(start, min(start + BATCH, len(self._shards))))
            yield numbers, [self._read(i) for i in numbers]

    def _read(self, i: int) -> Any:
        """The codec's input of one sample. Raises UserError if it is unreadable."""
        try:
            return self._modality.read_media(self._shards.read(i), self._shards.extensions[i])
        except UnreadableMedia as error:
            remedy = "rebuild these shards with `megamm data build`, which skips such samples"
            raise UserError(
                f"sample {self._shards.keys[i]}: {error}", where=self._shards.folder, remedy=remedy
            ) from error

    def _videos(self, modality: VideoModality) -> Iterator[tuple[list[int], list[Any]]]:
        """Batches of the videos that are not broken; the decoding is recorded."""
        assert self.decoding is not None
        stream = VideoStream(
            [Clip(self._shards, i) for i in range(len(self._shards))],
            modality.codec,
            choose_decoder(self._reading.decoder, modality.device),
            modality.device,
            batch_size=VIDEO_BATCH,
            max_broken=self._reading.max_broken,
        )
        for batch in stream:
            # The stream counts all broken clips; those beyond the recorded ones are new.
            for broken in stream.broken[len(self.decoding.broken) :]:
                self._skip(broken, self.decoding)
            if batch:
                yield [clip.number for clip in batch], [clip.frames for clip in batch]
        self.decoding.decoders = {str(name): stream.decoders[name] for name in sorted(stream.decoders)}

    def _skip(self, clip: BrokenClip, decoding: Decoding) -> None:
        """Record a broken video. Raises UserError if it is part of a document."""
        name = member_name(self._shards, clip.number)
        # A document without one of its parts would have a gap in its reading order, so it cannot be skipped alone.
        if self._shards.index.number_of(clip.number) != UNNUMBERED:
            remedy = "rebuild these shards with `megamm data build`, which skips such samples"
            raise UserError(f"{name}, part of a document: {clip.why}", where=self._shards.folder, remedy=remedy)
        decoding.broken[name] = clip.why
