"""Helpers to build the tiny packages for tests of public sources, and to read their samples."""

import io
from pathlib import Path

import av
import numpy as np
from PIL import Image

from megamm.data.raw.samples import RawSample

CUBE = """{materials}
v 0 0 0\nv 1 0 0\nv 1 2 0\nv 0 2 0\nv 0 0 1\nv 1 0 1\nv 1 2 1\nv 0 2 1
usemtl {material}
f 4 3 2 1\nf 5 6 7 8\nf 1 2 6 5\nf 2 3 7 6\nf 3 4 8 7\nf 4 1 5 8
"""


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def png(colour, size=(8, 6), mode="RGBA") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, format="PNG")
    return buffer.getvalue()


def contents(sample: RawSample) -> dict[str, str]:
    return {part.modality: part.content for part in sample.parts}


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path), mode="r") as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def target_folder(path: Path) -> Path:
    path.mkdir()
    return path


def tone(seconds: float, rate: int, hertz: float) -> np.ndarray:
    return (8000 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.int16)


def dotted_png(colour: tuple[int, int, int], size: tuple[int, int] = (8, 8)) -> bytes:
    """Return a picture of one colour except for a dot: the build drops pictures of a single colour."""
    image = Image.new("RGB", size, colour)
    image.putpixel((0, 0), (1, 2, 3))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
