"""Renders a few 3D things in a few colours, at slightly different angles and turning.

In: the unpacked Debian package `sweethome3d`, whose models are read as in data/sources/furniture.py. Out, for each
thing of THINGS and colour of COLOURS: point clouds (npz), their renderings (media/point_clouds.py), and a caption of
attributes in a fixed order, "red, armchair"; also a video of it turning each way, "turning left, red, armchair". The
noun is the thing. Attributes visible in few pixels come first in a caption, so that no earlier word predicts which of
their values occur in training.
"""

import multiprocessing
import os
import zipfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from megamm.common.errors import UserError
from megamm.data.raw.samples import RawPart, RawSample, normalise_noun
from megamm.data.sources.furniture import CatalogueModel, load_model, own_materials, read_catalogue
from megamm.data.sources.media import write_picture, write_video
from megamm.media.point_clouds import CloudArray, cloud_from_mesh, render

THINGS = frozenset(
    (
        *("armchair", "bath", "bunk bed", "chair", "fireplace", "lamp", "laptop", "mannequin", "piano", "plant"),
        *("round table", "sofa", "spiral staircase", "stool", "toilet unit", "washbasin"),
    )
)
COLOURS = {"red": (0.9, 0.15, 0.1), "green": (0.15, 0.7, 0.2), "blue": (0.15, 0.3, 0.9), "yellow": (1.0, 0.85, 0.1)}
"""RGB in [0, 1]; a thing's own brightness is kept."""
HEADING = 30.0
"""Viewing angle in degrees."""
SEEN_COPIES = (0.0, 4.0, -4.0, 8.0, -8.0, 12.0, -12.0, 16.0)
"""Degrees added to HEADING for the copies with a picture. Every second one also has a cloud."""
CLOUD_COPIES = (-84.0, -48.0, 48.0, 84.0)
"""The same for copies with only a cloud. With few copies the model memorises each instead of learning colours."""
TURN = 45.0
"""Degrees from one frame of a video to the next."""
FRAMES, FRAME_RATE = 5, 8
PICTURE = 72
"""Side of a picture in pixels."""
POINTS = 2048
_SURFACE = 6_000
"""Points drawn in a rendering."""


@dataclass(frozen=True)
class _ThingTask:
    """A thing to be drawn from the catalogue at `path`."""

    path: Path
    piece: CatalogueModel

    @property
    def key(self) -> str:
        return f"things-{self.piece.name.replace(' ', '-')}"


def write_things(package: Path, target: Path) -> list[RawSample]:
    """Write clouds, pictures and videos under target, and return the samples in order of things."""
    catalogues = sorted(path for path in package.rglob("*.jar") if path.is_file())
    if not catalogues:
        raise UserError("no catalogue (.jar) in the package", where=package, remedy="use Debian 12")
    for folder in ("points", "images", "video"):
        (target / folder).mkdir()
    with zipfile.ZipFile(catalogues[0]) as archive:
        pieces = read_catalogue(archive, target, catalogues[0].name)
    # Reversed, so that the first of several models with a name remains.
    first = {piece.name: piece for piece in reversed(pieces) if piece.name in THINGS}
    jobs = [_ThingTask(catalogues[0], first[name]) for name in sorted(first)]
    if not jobs:
        raise UserError("the catalogue has none of the things", where=catalogues[0], remedy="use Debian 12")
    make = partial(_make, target=target)
    workers = min(len(os.sched_getaffinity(0)), len(jobs) // 4)
    if workers < 2:
        return [sample for job in jobs for sample in make(job)]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return [sample for samples in pool.map(make, jobs) for sample in samples]


def _make(job: _ThingTask, target: Path) -> list[RawSample]:
    """Write one thing's media and return its samples."""
    with zipfile.ZipFile(job.path) as archive:
        mesh = load_model(archive, job.piece.model, own_materials(archive))
    # As in furniture.py, independent samplings for pictures and clouds.
    surface, cloud = cloud_from_mesh(mesh, _SURFACE, seed=0), cloud_from_mesh(mesh, POINTS, seed=1)
    samples: list[RawSample] = []
    for colour in COLOURS:
        seen = painted(surface, colour)
        samples += _stills(job, colour, seen, painted(cloud, colour), target)
        samples += _videos(job, colour, seen, target)
    return samples


def _stills(job: _ThingTask, colour: str, surface: CloudArray, cloud: CloudArray, target: Path) -> Iterator[RawSample]:
    """Copies of the painted thing: pictures, clouds or both, each with the caption."""
    noun, caption = normalise_noun(job.piece.name), RawPart("text", f"{colour}, {job.piece.name}")
    for number, degrees in enumerate((*SEEN_COPIES, *CLOUD_COPIES)):
        key, parts = f"{job.key}-{colour}-{number}", []
        # Every second copy with a picture, and every copy without one, has a cloud.
        if number >= len(SEEN_COPIES) or number % 2 == 0:
            parts.append(RawPart("points", f"points/{key}.npz"))
            np.savez_compressed(target / f"points/{key}.npz", points=about_vertical(cloud, HEADING + degrees))
        if number < len(SEEN_COPIES):
            parts.append(RawPart("image", f"images/{key}.png"))
            write_picture(target / f"images/{key}.png", render(surface, HEADING + degrees, PICTURE))
        yield RawSample(key, noun, (*parts, caption))


def _videos(job: _ThingTask, colour: str, surface: CloudArray, target: Path) -> Iterator[RawSample]:
    """The painted thing turning each way."""
    for direction, sign in (("left", -1), ("right", 1)):
        key = f"{job.key}-{colour}-turning-{direction}"
        angles = HEADING + sign * TURN * np.arange(FRAMES)
        write_video(target / f"video/{key}.mp4", np.stack([render(surface, a, PICTURE) for a in angles]), FRAME_RATE)
        caption = RawPart("text", f"turning {direction}, {colour}, {job.piece.name}")
        yield RawSample(key, normalise_noun(job.piece.name), (RawPart("video", f"video/{key}.mp4"), caption))


def painted(cloud: CloudArray, colour: str) -> CloudArray:
    """A cloud `[N, 9]` in a colour of COLOURS, with its brightness mapped to 0.4 to 1 of the colour."""
    brightness = 0.4 + 0.6 * cloud[:, 6:].mean(axis=1, keepdims=True)
    return np.concatenate([cloud[:, :6], brightness * np.array(COLOURS[colour], dtype=np.float32)], axis=1)


def about_vertical(cloud: CloudArray, angle: float) -> CloudArray:
    """A cloud `[N, 9]` turned by `angle` degrees about the y axis, like the clouds that `render` draws."""
    sin, cos = np.sin(np.radians(angle)), np.cos(np.radians(angle))
    matrix = np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]], dtype=np.float32)
    return np.concatenate([cloud[:, :3] @ matrix.T, cloud[:, 3:6] @ matrix.T, cloud[:, 6:]], axis=1)
