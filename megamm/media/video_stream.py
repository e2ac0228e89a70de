"""Video clips from shards in a fixed order, decoded in batches: bytes -> uint8 `[F, Y, X, 3]` for the visual codec.

    stream = VideoStream(clips, codec, choose_decoder("auto", device), device, consumed=state)
    for batch in stream: ...; state = stream.state()

The state is one integer, the clips consumed: clip i gives the same frames in a batch of any size, from any start and
on any number of threads, so a stream resumes exactly where another one stopped. A batch is decoded while the previous
one is used. DALI decodes on a GPU, PyAV on a CPU; clips that DALI cannot decode (media/video_dali.py) are decoded by
PyAV. Each clip records its decoder. Broken files are logged by name and skipped, up to a limit.
"""

import importlib.util
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch

from megamm.common.errors import UnreadableMedia, UserError
from megamm.media.video_clip import ClipPlan, decode_clip, plan_clip
from megamm.media.video_dali import DaliDecoder, obstacle
from megamm.media.video_file import FrameArray, VideoSizes
from megamm.shards.folder import ShardFolder

logger = logging.getLogger(__name__)

Decoder = Literal["dali", "pyav"]
NAMED = 5
"""Broken clips that an error message names; the log names all."""


@dataclass(frozen=True)
class Clip:
    """A member of a folder of video shards, from `start_seconds` after its first frame on."""

    shards: ShardFolder
    member: int
    start_seconds: float = 0.0

    def __str__(self) -> str:
        start = f" from {self.start_seconds:g} s" if self.start_seconds else ""
        return f"{self.shards.folder}: {self.shards.keys[self.member]}{start}"


@dataclass(frozen=True)
class DecodedClip:
    """The clip of this number in the stream: uint8 `[F, Y, X, 3]`, Y = X = image_size."""

    number: int
    frames: FrameArray
    decoder: Decoder


@dataclass(frozen=True)
class BrokenClip:
    """The clip of this number cannot be decoded."""

    number: int
    why: str


def choose_decoder(wanted: Literal["auto", "dali", "pyav"], device: torch.device) -> Decoder:
    """The video decoder for a codec on that device, logged with the reason. Raises UserError if it is missing."""
    has_dali = _has_dali()
    if wanted == "dali" and not has_dali:
        raise UserError("DALI is not installed", remedy="install megamm's extra for GPUs, or use pyav")
    if wanted != "auto":
        reason = "requested"
    elif device.type == "cpu":
        wanted, reason = "pyav", "on a CPU, where DALI cannot read H.264"
    elif has_dali:
        wanted, reason = "dali", "it decodes on the GPU"
    else:
        wanted, reason = "pyav", "DALI, which decodes on the GPU, is not installed"
    logger.info("decoding videos with %s: %s", {"dali": "DALI", "pyav": "PyAV"}[wanted], reason)
    return wanted


def _has_dali() -> bool:
    """Whether nvidia.dali can be imported (the name "nvidia" alone is used by many packages)."""
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


class VideoStream:
    """The clips from number `consumed` on, in batches of `batch_size`; see the module docstring.

    sizes: the codec's input sizes. device: where DALI decodes. workers: threads. max_broken: allowed share of broken
    clips; the batch that exceeds it since this stream began raises a UserError that names some.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        sizes: VideoSizes,
        decoder: Decoder,
        device: torch.device,
        *,
        batch_size: int = 32,
        workers: int | None = None,
        consumed: int = 0,
        max_broken: float = 0.0,
    ) -> None:
        self.clips, self.sizes, self.device = clips, sizes, device
        self.broken: list[BrokenClip] = []
        self.decoders: Counter[Decoder] = Counter()
        """Number of clips decoded so far, by decoder."""
        self._batch_size, self._max_broken, self._consumed = batch_size, max_broken, consumed
        self._workers = workers or min(8, len(os.sched_getaffinity(0)))
        self._obstacles: Counter[str] = Counter()
        self._dali: DaliDecoder | None = None
        if decoder == "dali":
            self._dali = DaliDecoder(sizes.image_size, device, batch_size=batch_size, threads=self._workers)

    def state(self) -> int:
        """Clips handed out so far, including broken ones: pass it as `consumed` to a stream that resumes here."""
        return self._consumed

    def __iter__(self) -> Iterator[list[DecodedClip]]:
        """Batches of the clips that are not broken, each in the order of its clips."""
        # One thread prepares the next batch, and its clips are decoded on the pool: one pool for both could deadlock,
        # with every thread waiting for a free one.
        with ThreadPoolExecutor(self._workers) as pool, ThreadPoolExecutor(1) as ahead:
            following = ahead.submit(self._decode, pool, self._consumed)
            while self._consumed < len(self.clips):
                results = following.result()
                stop = self._consumed + len(results)
                # Start the next batch before this one is handed out.
                if stop < len(self.clips):
                    following = ahead.submit(self._decode, pool, stop)
                decoded = [r for r in results if isinstance(r, DecodedClip)]
                self._count([r for r in results if isinstance(r, BrokenClip)])
                self.decoders.update(clip.decoder for clip in decoded)
                # Set before the yield: a state saved while the caller uses this batch includes it.
                self._consumed = stop
                yield decoded

    def _count(self, broken: list[BrokenClip]) -> None:
        """Count broken clips; raises UserError if the total exceeds the limit."""
        for clip in broken:
            logger.warning("skipped: %s: %s", self.clips[clip.number], clip.why)
        self.broken += broken
        if broken and len(self.broken) > self._max_broken * len(self.clips):
            some = "; ".join(f"{self.clips[b.number]}: {b.why}" for b in self.broken[:NAMED])
            what = f"{len(self.broken)} of {len(self.clips)} videos are broken, "
            what += f"the limit is {self._max_broken:.1%}: {some}"
            remedy = "rebuild these shards with `megamm data build`, which skips such samples, or raise the limit"
            raise UserError(what, where=self.clips[broken[0].number].shards.folder, remedy=remedy)

    def _decode(self, pool: ThreadPoolExecutor, start: int) -> list[DecodedClip | BrokenClip]:
        """Decode the batch that starts at this clip number, with one result for each clip, in order."""
        numbers = range(start, min(start + self._batch_size, len(self.clips)))
        data = [self.clips[n].shards.read(self.clips[n].member) for n in numbers]
        if self._dali is None:
            return list(pool.map(self._by_pyav, numbers, data, [None] * len(data)))
        # DALI decodes all clips of a batch in one call, so plan them first, and set aside those it cannot decode.
        plans = list(pool.map(self._plan, numbers, data))
        results: dict[int, DecodedClip | BrokenClip] = {p.number: p for p in plans if isinstance(p, BrokenClip)}
        planned = [(n, d, p) for n, d, p in zip(numbers, data, plans, strict=True) if isinstance(p, ClipPlan)]
        fit = [clip for clip in planned if not self._is_obstructed(clip[2])]
        results |= self._by_dali(fit)
        # These clips have an obstacle, or DALI failed on them.
        rest = [clip for clip in planned if clip[0] not in results]
        results |= {r.number: r for r in pool.map(self._by_pyav, *zip(*rest, strict=True))} if rest else {}
        return [results[n] for n in numbers]

    def _is_obstructed(self, plan: ClipPlan) -> bool:
        """Whether DALI cannot decode this clip; the reason is logged when it first occurs."""
        reason = obstacle(plan, self.device)
        if reason:
            self._log_once(reason)
        return reason is not None

    def _log_once(self, reason: str) -> None:
        self._obstacles[reason] += 1
        if self._obstacles[reason] == 1:
            logger.warning("decoding with PyAV instead of DALI: %s", reason)

    def _plan(self, number: int, data: bytes) -> ClipPlan | BrokenClip:
        """The plan of a clip, or the reason why there is none."""
        clip = self.clips[number]
        try:
            return plan_clip(data, clip.shards.extensions[clip.member], clip.start_seconds, self.sizes)
        except UnreadableMedia as error:
            return BrokenClip(number, str(error))

    def _by_pyav(self, number: int, data: bytes, plan: ClipPlan | None) -> DecodedClip | BrokenClip:
        """Decode one clip with PyAV; plan: None if it has not been planned yet."""
        found = plan or self._plan(number, data)
        if isinstance(found, BrokenClip):
            return found
        clip = self.clips[number]
        try:
            extension = clip.shards.extensions[clip.member]
            return DecodedClip(number, decode_clip(data, extension, found, self.sizes.image_size), "pyav")
        except UnreadableMedia as error:
            return BrokenClip(number, str(error))

    def _by_dali(self, clips: Sequence[tuple[int, bytes, ClipPlan]]) -> dict[int, DecodedClip | BrokenClip]:
        """Decode with DALI. A failing batch is split in half until the failing clips are alone."""
        assert self._dali is not None
        try:
            squares = self._dali.decode([(data, plan) for _, data, plan in clips])
        except UnreadableMedia as error:
            if len(clips) == 1:
                self._log_once(str(error))
                return {}
            # DALI does not report which clip failed: n clips with one failure need about 2 log2(n) calls.
            half = len(clips) // 2
            return self._by_dali(clips[:half]) | self._by_dali(clips[half:])
        return {n: DecodedClip(n, frames, "dali") for (n, _, _), frames in zip(clips, squares, strict=True)}
