"""Furniture and household things in 3D with their names, from the catalogues of Sweet Home 3D.

In: the unpacked Debian package `sweethome3d` (the program's jar contains its default catalogue) or
`sweethome3d-furniture` (catalogues as .sh3f files, all or some). Both are zip files with a list in Java's .properties
format, Wavefront OBJ models and icons; they are read in memory and not unpacked. Out, for each model: a point cloud
(npz), category, proportion and name as caption, and a picture: the catalogue's icon (drawn by Sweet Home 3D), and
further samples turned by TURNS, each with its own cloud and a rendering (media/point_clouds.py); the first of these
also has a turntable video. Models of one file under several names (lamps by colour of their light) count once.
"""

import io
import logging
import multiprocessing
import os
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megamm.common.errors import UserError
from megamm.data.raw.samples import RawPart, RawSample, clean_caption, normalise_noun
from megamm.data.sources.media import append_credits, write_picture, write_video
from megamm.media.point_clouds import CloudArray, cloud_from_mesh, render

if TYPE_CHECKING:
    import trimesh

logger = logging.getLogger(__name__)
POINTS = 4096
_SURFACE = 40_000
"""Points drawn in a rendering; half of them in a frame of the video."""
ANGLE = 30
"""Viewing angle of the renderings in degrees: shows a front corner of a piece that is not turned."""
TURNS = (0, 1, 2, 3)
"""Quarter turns about the vertical axis, the same for a picture and its cloud."""
PICTURE = 128
"""Pixels of a rendering, about the size of the icons."""
TURN_FRAMES, TURN_RATE = 17, 8
"""A full turn in two seconds: the last frame equals the first."""
_PIECES_PER_WORKER = 20
"""Fewer pieces are finished before a process has started."""
_LISTS = re.compile(r"(?:.*/)?(?:DefaultFurnitureCatalog|PluginFurnitureCatalog)\.properties")
_MATERIALS = re.compile(rb"newmtl \w+\n(?:\w+ [\d. ]+\n)+")
_OWN_MATERIALS = "sweethome3d-materials.mtl"
_ESCAPE = re.compile(r"\\u([0-9a-fA-F]{4})")


@dataclass(frozen=True)
class CatalogueModel:
    """A model of a catalogue: name, category ("" if unknown), author, and its files in the zip file."""

    name: str
    category: str
    creator: str
    model: str
    icon: str


@dataclass(frozen=True)
class _ModelTask:
    """A model to be drawn: its catalogue, and the start of its samples' keys."""

    catalogue: Path
    key: str
    piece: CatalogueModel


class ZipFiles(Mapping[str, bytes]):
    """The files that a model may refer to (materials, textures): those of its folder in the zip file, and `more`."""

    def __init__(self, archive: zipfile.ZipFile, folder: str, more: dict[str, bytes]) -> None:
        self.archive, self.folder, self.more = archive, folder, more

    def __getitem__(self, name: str) -> bytes:
        """The bytes of a file. Raises KeyError if it is missing."""
        # Models written on Windows use backslashes, and some write `./` before a name.
        return self.more.get(name) or self.archive.read(
            self.folder + name.strip().replace("\\", "/").removeprefix("./")
        )

    def __iter__(self) -> Iterator[str]:
        beside = (name.removeprefix(self.folder) for name in self.archive.namelist() if name.startswith(self.folder))
        return iter([*self.more, *beside])

    def __len__(self) -> int:
        return sum(1 for _ in self)


def write_furniture(package: Path, target: Path) -> list[RawSample]:
    """Write clouds, pictures and videos under target, and return the samples in order of catalogue and number."""
    catalogues = sorted(p for p in package.rglob("*") if p.suffix in (".jar", ".sh3f") and p.is_file())
    if not catalogues:
        raise UserError("no catalogue (.jar, .sh3f) in the package", where=package, remedy="use Debian 12")
    for folder in ("points", "images", "video"):
        (target / folder).mkdir()
    jobs = []
    for path in catalogues:
        name = re.sub(r"[^a-z0-9]+", "-", path.stem.lower())
        with zipfile.ZipFile(path) as archive:
            pieces = read_catalogue(archive, target, path.name)
        jobs += [
            _ModelTask(path, f"furniture-{name}-{number:03d}", piece) for number, piece in enumerate(pieces, start=1)
        ]
    samples = []
    for job, made in zip(jobs, _made(jobs, target), strict=True):
        if isinstance(made, str):
            logger.warning("%s: %s skipped: %s", job.catalogue.name, job.piece.model, made)
        else:
            samples += made
    return samples


def _made(jobs: list[_ModelTask], target: Path) -> Iterator[list[RawSample] | str]:
    """The samples of every job in order, or the reason for none; in worker processes if there are enough jobs."""
    make = partial(_make, target=target)
    workers = min(len(os.sched_getaffinity(0)), len(jobs) // _PIECES_PER_WORKER)
    if not workers:
        yield from map(make, jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield from pool.map(make, jobs, chunksize=4)
        except BrokenProcessPool as error:
            remedy = "probably out of memory: free some memory and try again"
            raise UserError("a worker process was killed", where=target, remedy=remedy) from error


def _make(job: _ModelTask, target: Path) -> list[RawSample] | str:
    """Write one model's media; returns its samples, or the reason for none."""
    with zipfile.ZipFile(job.catalogue) as archive:
        try:
            # Two independent samplings: the cloud of a sample is not a part of the points that its picture shows.
            mesh = load_model(archive, job.piece.model, own_materials(archive))
            surface, cloud = cloud_from_mesh(mesh, _SURFACE, seed=0), cloud_from_mesh(mesh, POINTS, seed=1)
        except (ValueError, KeyError, IndexError) as error:
            return str(error)
        return _write_piece(target, job.key, job.piece, cloud, surface, archive)


def read_catalogue(archive: zipfile.ZipFile, target: Path, name: str) -> list[CatalogueModel]:
    """The pieces of a catalogue, each model once; adds its licence and authors to the attribution in `target`."""
    lists = [entry for entry in archive.namelist() if _LISTS.fullmatch(entry)]
    if not lists:
        raise UserError("no furniture list in the catalogue", where=name, remedy="use Debian 12")
    values = read_properties(archive.read(lists[0]).decode("latin-1"))
    pieces, models = [], set()
    works: dict[str, list[str]] = defaultdict(list)
    numbers = sorted(int(key.removeprefix("name#")) for key in values if key.startswith("name#"))
    for number in numbers:
        caption = furniture_caption(values[f"name#{number}"])
        model, icon = (values.get(f"{field}#{number}", "").lstrip("/") for field in ("model", "icon"))
        # Entries that differ only in name or light share a model file: keep the first.
        if not caption or model in models or not model.lower().endswith(".obj"):
            continue
        models.add(model)
        creator = values.get(f"creator#{number}", "unnamed")
        works[creator].append(caption)
        category = furniture_caption(values.get(f"category#{number}", ""))
        pieces.append(CatalogueModel(caption, category, creator, model, icon))
    licence = clean_caption(values.get("license", ""))
    authors = [f"- {creator}: {', '.join(captions)}" for creator, captions in sorted(works.items())]
    append_credits(target, [f"{name}: {values.get('name', '')}. {licence}. Models by:", "", *authors])
    return pieces


def read_properties(text: str) -> dict[str, str]:
    r"""Java's .properties: `key=value` lines, # comments, \uXXXX for characters outside Latin-1."""
    lines = (line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith(("#", "!")))
    return {key.strip(): _ESCAPE.sub(lambda code: chr(int(code[1], 16)), value.strip()) for key, value in lines}


def furniture_caption(name: str) -> str:
    """Lower-case name without sizes ("Bed 140x190") and counters ("Chair 2")."""
    return clean_caption(re.sub(r"\b\d+(x\d+)*\b", " ", name.lower())).strip(" -,")


def own_materials(archive: zipfile.ZipFile) -> bytes:
    """The program's named default materials, which its models use implicitly: text inside a class file."""
    # The strings of a Java class file are plain bytes, so the definitions can be found without parsing it.
    name = "com/eteks/sweethome3d/j3d/OBJLoader.class"
    return b"\n".join(_MATERIALS.findall(archive.read(name))) if name in archive.namelist() else b""


def load_model(archive: zipfile.ZipFile, model: str, materials: bytes) -> "trimesh.Scene":
    """A Wavefront OBJ model of a catalogue. Raises ValueError, KeyError or IndexError if it is damaged."""
    import trimesh

    text = archive.read(model)
    # Models without a material library use the program's own materials: name one that the resolver provides.
    if materials and b"mtllib" not in text:
        text = f"mtllib {_OWN_MATERIALS}\n".encode() + text
    resolver = ZipFiles(archive, model.rpartition("/")[0] + "/", {_OWN_MATERIALS: materials})
    return trimesh.load_scene(io.BytesIO(text), file_type="obj", resolver=resolver, process=False)


def _write_piece(
    target: Path, key: str, piece: CatalogueModel, cloud: CloudArray, surface: CloudArray, archive: zipfile.ZipFile
) -> list[RawSample]:
    """Write the media of one model, and return a sample for each picture."""
    # Half of the points suffice for the small frames of a video, in half the time.
    turn = [render(surface[::2], 360 * frame / (TURN_FRAMES - 1), PICTURE) for frame in range(TURN_FRAMES - 1)]
    write_video(target / f"video/{key}.mp4", np.stack([*turn, turn[0]]), TURN_RATE)
    pictures = [(turns, f"{key}-turn{turns}", render(turned(surface, turns), ANGLE, PICTURE)) for turns in TURNS]
    if piece.icon in archive.namelist():
        pictures.append((0, f"{key}-icon", _on_white(archive.read(piece.icon))))
    samples = []
    for turns, name, picture in pictures:
        write_picture(target / f"images/{name}.png", picture)
        np.savez_compressed(target / f"points/{key}-turn{turns}.npz", points=turned(cloud, turns))
        parts = [RawPart("points", f"points/{key}-turn{turns}.npz"), RawPart("image", f"images/{name}.png")]
        parts += [RawPart("video", f"video/{key}.mp4")] if name.endswith("turn0") else []
        # Category and proportion describe the form, even if the name was never seen in training.
        caption = f"{proportion(cloud)} {piece.name}"
        parts.append(RawPart("text", f"{piece.category}: {caption}" if piece.category else caption))
        samples.append(RawSample(name, normalise_noun(piece.name), tuple(parts)))
    return samples


def proportion(cloud: CloudArray) -> str:
    """A word for the bounding box of a cloud `[N, 9]`, the same for every quarter turn about the vertical axis (y)."""
    x, height, z = cloud[:, :3].max(axis=0) - cloud[:, :3].min(axis=0)
    width, depth = max(x, z), min(x, z)
    if height > 1.5 * width:
        return "tall"
    if height < 0.6 * width and height <= depth:
        return "low"
    return "long" if width > 2 * depth else "compact"


def turned(cloud: CloudArray, quarters: int) -> CloudArray:
    """A cloud `[N, 9]` turned by this many quarters about the vertical axis (y): x goes to -z, z to x."""
    result = cloud.copy()
    for _ in range(quarters):
        # Columns 0 and 2 are x and z, 3 and 5 those of the normal.
        result[:, [0, 2, 3, 5]] = result[:, [2, 0, 5, 3]] * np.array([1, -1, 1, -1], dtype=cloud.dtype)
    return result


def _on_white(icon: bytes) -> np.ndarray:
    """A PNG with transparency as uint8 [Y, X, 3] on white, like the renderings."""
    from PIL import Image

    with Image.open(io.BytesIO(icon)) as image:
        layer = image.convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    white.alpha_composite(layer)
    return np.asarray(white.convert("RGB"))
