"""Tiny sources for the codec tests: captioned pictures of coloured shapes, and videos of them, as real shards."""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

from megamm.shards.folder import ShardWriter

COLOURS = ["red", "green", "blue", "orange", "purple", "black"]


def shape_picture(number: int, size: int = 32) -> tuple[Image.Image, str]:
    """Return one shape on white, as a function of the number."""
    rng = np.random.default_rng(number)
    image = Image.new("RGB", (size, size), "white")
    colour, kind = COLOURS[rng.integers(len(COLOURS))], ("ellipse", "rectangle")[rng.integers(2)]
    corner, extent = rng.integers(0, size // 2, 2), rng.integers(size // 4, size // 2, 2)
    getattr(ImageDraw.Draw(image), kind)([*corner.tolist(), *(corner + extent).tolist()], fill=colour)
    return image, f"a {colour} {kind}"


def shape_video(number: int, frames: int = 9, size: int = 32) -> np.ndarray:
    """Return a picture that moves to the right, one pixel a frame, on white: uint8 `[frames, size, size, 3]`."""
    picture = np.asarray(shape_picture(number, size)[0])
    wide = np.pad(picture, ((0, 0), (frames, 0), (0, 0)), constant_values=255)
    return np.stack([wide[:, frames - f : frames - f + size] for f in range(frames)])


def video_bytes(
    frames: np.ndarray,
    rate: float = 8,
    container: str = "mp4",
    codec: str = "libvpx-vp9",
    times: list[int] | None = None,
    aspect: Fraction | None = None,
    rotation: int = 0,
    **options: str,
) -> bytes:
    """Encode uint8 `[F, Y, X, 3]` as a video file with PyAV alone. times: ticks of a millisecond, one a frame."""
    file = io.BytesIO()
    tick = Fraction(1, 1000) if times else 1 / Fraction(rate)
    with av.open(file, "w", format=container, options=options) as out:
        stream = out.add_stream(codec, rate=1000 if times else Fraction(rate), options={"crf": "10"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.time_base = (
            "yuv420p" if frames.shape[1] % 2 == 0 == frames.shape[2] % 2 else "yuv444p",
            tick,
        )
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotation:
            stream.set_display_rotation(rotation)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = times[number] if times else number, tick
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file.getvalue()


def write_videos(folder: Path, train: int, heldout: int, frames: int = 9) -> Path:
    """Write `folder/<split>/video/` shards of moving pictures, next to those of write_source."""
    for split, numbers in (("train", range(train)), ("heldout", range(10_000, 10_000 + heldout))):
        with ShardWriter(folder / split / "video") as writer:
            for n in numbers:
                writer.add(f"s{n}", "mp4", video_bytes(shape_video(n, frames)))
    return folder


def as_bytes(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """Return the file a user would have."""
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def write_source(folder: Path, train: int, heldout: int, per_shard: int = 1000) -> Path:
    """Write `folder/<split>/<modality>/` shards of text and images with the same keys."""
    for split, numbers in (("train", range(train)), ("heldout", range(10_000, 10_000 + heldout))):
        text = ShardWriter(folder / split / "text", samples_per_shard=per_shard)
        images = ShardWriter(folder / split / "image", samples_per_shard=per_shard)
        with text, images:
            for n in numbers:
                image, caption = shape_picture(n)
                text.add(f"s{n}", "txt", caption.encode())
                images.add(f"s{n}", "png", as_bytes(image))
    return folder
