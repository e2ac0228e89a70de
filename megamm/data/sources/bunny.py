"""Shots of the animated film Big Buck Bunny: video with its sound.

In: the unpacked source distribution of the Python package moviepy, which contains the film (1280 x 720, 24 Hz) in a
zip file. Out: shots as VP9 video of 320 x 180 pixels and FLAC, mono, 24 kHz, of the same time range, without captions.
The film is cut where its picture changes abruptly (mean change of colour over a small grid), and long shots into equal
parts; parts shorter than a second and a half are skipped. The parts of a shot share its noun.
"""

import io
import zipfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from megamm.common.errors import UserError
from megamm.data.raw.samples import RawPart, RawSample
from megamm.data.sources.media import append_credits, write_flac, write_video

if TYPE_CHECKING:
    from av.container import InputContainer

WIDTH, HEIGHT = 320, 180
SAMPLE_RATE = 24_000
LONGEST, SHORTEST = 6.0, 1.5
"""Seconds of a clip."""
_GRID = 20
"""Pixels per cell of the colour grid: 16 x 9 cells."""
_CUT = 25.0
"""Mean change of colour (of 255) between two frames that counts as a cut."""
_CREDITS = (
    "Big Buck Bunny: (c) copyright 2008, Blender Foundation, www.bigbuckbunny.org; Creative Commons Attribution 3.0.",
    "Changed: cut into shots, made smaller, sound mixed to one channel.",
)


def write_bunny(package: Path, target: Path) -> list[RawSample]:
    """Write the clips under target/video and target/audio and return them in order of time."""
    import av

    film_bytes = _film(package)
    for folder in ("video", "audio"):
        (target / folder).mkdir()
    append_credits(target, _CREDITS)
    with av.open(io.BytesIO(film_bytes), mode="r") as film:
        rate = film.streams.video[0].average_rate
        sound = _sound(film)
    assert rate is not None, "the film has no frame rate"
    # A second pass, because sound and pictures are interleaved in the file: the clips need the sound complete.
    samples = []
    with av.open(io.BytesIO(film_bytes), mode="r") as film:
        for shot, part, first, frames in clips(_frames(film), rate):
            key = f"bunny-{shot:03d}-{part}"
            start, end = (int(frame / rate * SAMPLE_RATE) for frame in (first, first + len(frames)))
            write_video(target / f"video/{key}.mp4", frames, rate)
            write_flac(target / f"audio/{key}.flac", sound[start:end], SAMPLE_RATE)
            parts = (RawPart("audio", f"audio/{key}.flac"), RawPart("video", f"video/{key}.mp4"))
            samples.append(RawSample(key, f"big buck bunny shot {shot}", parts))
    return samples


def _film(package: Path) -> bytes:
    """The longest video in the package's zip files."""
    for path in sorted(package.rglob("*.zip")):
        with zipfile.ZipFile(path) as archive:
            films = [entry for entry in archive.infolist() if entry.filename.endswith(".mp4")]
            if films:
                return archive.read(max(films, key=lambda entry: entry.file_size))
    raise UserError("no film in the package", where=package, remedy="report the moviepy version as an issue")


def clips(
    frames: Iterator[npt.NDArray[np.uint8]], rate: Fraction
) -> Iterator[tuple[int, int, int, npt.NDArray[np.uint8]]]:
    """(shot, part, number of the first frame, frames [F, Y, X, 3]) of a film, without parts that are too short."""
    first = 0
    for shot, stretch in enumerate(_shots(frames)):
        parts = -(-len(stretch) // int(LONGEST * rate))
        # Equal parts, so that no short rest is left of a long shot.
        for part, piece in enumerate(np.array_split(np.stack(stretch), parts)):
            if len(piece) >= SHORTEST * rate:
                yield shot, part, first, piece
            # Parts that are too short count too: `first` numbers the frames of the film.
            first += len(piece)


def _shots(frames: Iterator[npt.NDArray[np.uint8]]) -> Iterator[list[npt.NDArray[np.uint8]]]:
    """The film's frames, split where the picture changes abruptly."""
    stretch: list[npt.NDArray[np.uint8]] = []
    before = None
    for frame in frames:
        # Rows and columns beyond a whole number of cells are ignored.
        height, width = (side // _GRID * _GRID for side in frame.shape[:2])
        cells = frame[:height, :width].reshape(height // _GRID, _GRID, width // _GRID, _GRID, 3).mean((1, 3))
        if before is not None and np.abs(cells - before).mean() > _CUT:
            yield stretch
            stretch = []
        stretch.append(frame)
        before = cells
    if stretch:
        yield stretch


def _frames(film: "InputContainer") -> Iterator[npt.NDArray[np.uint8]]:
    """The film's frames, scaled, uint8 `[Y, X, 3]`."""
    for frame in film.decode(video=0):
        yield np.asarray(frame.reformat(width=WIDTH, height=HEIGHT, format="rgb24").to_ndarray(), dtype=np.uint8)


def _sound(film: "InputContainer") -> npt.NDArray[np.int16]:
    """int16 [samples], all channels mixed."""
    from av.audio.resampler import AudioResampler

    resampler = AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE)
    frames = [out for frame in film.decode(audio=0) for out in resampler.resample(frame)]
    # None returns the samples that the resampler still holds.
    frames += resampler.resample(None)
    return np.concatenate([frame.to_ndarray().reshape(-1) for frame in frames]).astype(np.int16)
