"""A few things in 3D, each in two poses and four headings, and turning: the models of Sweet Home 3D drawn by us.

In: the unpacked Debian package `sweethome3d`, read as in data/sources/furniture.py. Out, for each thing of THINGS,
pose and heading: a point cloud (npz), a picture of it by data/render3d.py and a caption of attributes in a fixed order,
"armchair, upright, facing left"; for each thing, pose, direction and speed a video of it turning,
"armchair, lying, turning left, slowly". The noun is the thing. Chosen are things that look different from each side.
Each is there once for each of WOBBLES, turned by that many steps more: whole pictures cannot be learnt by heart.
"""

import multiprocessing
import os
import zipfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np

from megamm.data.meshes import CloudArray, cloud_from_mesh
from megamm.data.nouns import normalise_noun
from megamm.data.render3d import render
from megamm.data.samples import RawPart, RawSample
from megamm.data.sources.furniture import Piece, load_model, own_materials, read_catalogue
from megamm.data.sources.media import write_picture, write_video
from megamm.errors import UserError

THINGS = frozenset(
    (
        *("armchair", "bunk bed", "chair", "desk", "fireplace", "front door", "laptop", "piano", "sofa", "staircase"),
        *("toilet unit", "work lamp"),
    )
)
HEADINGS = ("front", "right", "back", "left")
"""Each is the one before it turned by a quarter, anticlockwise seen from above."""
POSES = ("upright", "lying")
SPEEDS = {"slowly": 4, "fast": 8}
"""In steps of STEP from one frame to the next."""
STEP = 5.625
"""Degrees: 64 steps are a full turn, sixteen of them from one heading to the next."""
WOBBLES = (0, -2, -1, 1, 2)
"""In steps."""
FRAMES, FRAME_RATE = 5, 8
PICTURE = 64
"""Pixels a side."""
POINTS = 2048
_SURFACE = 6_000
"""Points that a rendering draws."""


@dataclass(frozen=True)
class _Job:
    """One thing to be drawn from the catalogue at `path`."""

    path: Path
    piece: Piece

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
    first = {piece.name: piece for piece in reversed(pieces) if piece.name in THINGS}
    jobs = [_Job(catalogues[0], first[name]) for name in sorted(first)]
    if not jobs:
        raise UserError("none of the things in the catalogue", where=catalogues[0], remedy="use Debian 12")
    make = partial(_make, target=target)
    workers = min(len(os.sched_getaffinity(0)), len(jobs) // 4)
    if workers < 2:
        return [sample for job in jobs for sample in make(job)]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return [sample for samples in pool.map(make, jobs) for sample in samples]


def _make(job: _Job, target: Path) -> list[RawSample]:
    """Write one thing's media and return its samples."""
    with zipfile.ZipFile(job.path) as archive:
        mesh = load_model(archive, job.piece.model, own_materials(archive))
    surface, cloud = cloud_from_mesh(mesh, _SURFACE, seed=0), cloud_from_mesh(mesh, POINTS, seed=1)
    samples: list[RawSample] = []
    for pose in POSES:
        if pose == "lying":
            surface, cloud = on_its_back(surface), on_its_back(cloud)
        views = np.stack([render(surface, step * STEP, PICTURE) for step in range(round(360 / STEP))])
        samples += _stills(job, pose, cloud, views, target)
        samples += _videos(job, pose, views, target)
    return samples


def _stills(job: _Job, pose: str, cloud: CloudArray, views: np.ndarray, target: Path) -> Iterator[RawSample]:
    """The thing in each heading: cloud, picture and caption."""
    for (number, heading), wobble in product(enumerate(HEADINGS), WOBBLES):
        key = f"{job.key}-{pose}-{heading.replace(' ', '-')}-{WOBBLES.index(wobble)}"
        angle = (number * 360 / len(HEADINGS) + wobble * STEP) % 360
        write_picture(target / f"images/{key}.png", views[round(angle / STEP)])
        np.savez_compressed(target / f"points/{key}.npz", points=about_vertical(cloud, angle))
        caption = f"{job.piece.name}, {pose}, facing {heading}"
        parts = (RawPart("points", f"points/{key}.npz"), RawPart("image", f"images/{key}.png"))
        yield RawSample(key, normalise_noun(job.piece.name), (*parts, RawPart("text", caption)))


def _videos(job: _Job, pose: str, views: np.ndarray, target: Path) -> Iterator[RawSample]:
    """The thing turning, from its front on, each way and at each speed."""
    for (direction, sign), speed, wobble in product((("left", -1), ("right", 1)), SPEEDS, WOBBLES):
        key = f"{job.key}-{pose}-turning-{direction}-{speed}-{WOBBLES.index(wobble)}"
        numbers = (sign * SPEEDS[speed] * np.arange(FRAMES) + wobble) % len(views)
        write_video(target / f"video/{key}.mp4", views[numbers], FRAME_RATE)
        caption = f"{job.piece.name}, {pose}, turning {direction}, {speed}"
        parts = (RawPart("video", f"video/{key}.mp4"), RawPart("text", caption))
        yield RawSample(key, normalise_noun(job.piece.name), parts)


def about_vertical(cloud: CloudArray, angle: float) -> CloudArray:
    """A cloud `[N, 9]` turned by `angle` degrees about the y axis, as `render` turns what it draws."""
    sin, cos = np.sin(np.radians(angle)), np.cos(np.radians(angle))
    matrix = np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]], dtype=np.float32)
    return np.concatenate([cloud[:, :3] @ matrix.T, cloud[:, 3:6] @ matrix.T, cloud[:, 6:]], axis=1)


def on_its_back(cloud: CloudArray) -> CloudArray:
    """A cloud `[N, 9]` tipped over backwards by a quarter: its front (z) is up (y), its top is behind."""
    result = cloud.copy()
    for first in (0, 3):
        result[:, first + 1], result[:, first + 2] = cloud[:, first + 2], -cloud[:, first + 1]
    return result
