"""Tiny sources for the codec tests: captioned pictures of coloured shapes, as real shards."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from megamm.data.shards import ShardWriter

COLOURS = ["red", "green", "blue", "orange", "purple", "black"]


def shape_picture(number: int, size: int = 32) -> tuple[Image.Image, str]:
    """One shape on white; everything follows from the number."""
    rng = np.random.default_rng(number)
    image = Image.new("RGB", (size, size), "white")
    colour, kind = COLOURS[rng.integers(len(COLOURS))], ("ellipse", "rectangle")[rng.integers(2)]
    corner, extent = rng.integers(0, size // 2, 2), rng.integers(size // 4, size // 2, 2)
    getattr(ImageDraw.Draw(image), kind)([*corner.tolist(), *(corner + extent).tolist()], fill=colour)
    return image, f"a {colour} {kind}"


def as_bytes(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """The file a user would have."""
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def write_source(folder: Path, train: int, heldout: int, per_shard: int = 1000) -> Path:
    """`folder/<split>/<modality>/` shards of text and images with the same keys."""
    for split, numbers in (("train", range(train)), ("heldout", range(10_000, 10_000 + heldout))):
        text = ShardWriter(folder / split / "text", samples_per_shard=per_shard)
        images = ShardWriter(folder / split / "image", samples_per_shard=per_shard)
        with text, images:
            for n in numbers:
                image, caption = shape_picture(n)
                text.add(f"s{n}", "txt", caption.encode())
                images.add(f"s{n}", "png", as_bytes(image))
    return folder
