"""Writes the files of the sources: FLAC for sound, VP9 in MP4 for video, PNG, and ATTRIBUTION.md beside them.

The same input gives the same bytes. VP9 is the newest format that DALI decodes on a CPU; all players support it too.
ATTRIBUTION.md states origin and licence, which the licences require to be passed on.
"""

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import numpy as np

ATTRIBUTION = "ATTRIBUTION.md"
_QUALITY = "24"
"""VP9's constant quality (0 best, 63 worst)."""


def write_flac(path: Path, samples: np.ndarray, sample_rate: int) -> None:
    """Write int16 [samples] (mono) or [samples, channels], 16 bits per sample."""
    import soundfile

    soundfile.write(path, samples, sample_rate, format="FLAC", subtype="PCM_16")


def write_video(path: Path, frames: np.ndarray, frame_rate: Fraction | int) -> None:
    """Write uint8 [F, Y, X, 3], Y and X even, at frame_rate (Hz), every frame with the same duration."""
    import av

    # One thread and bitexact output: the same bytes on every machine with this build of libvpx.
    options = {"crf": _QUALITY, "b": "0", "deadline": "realtime", "cpu-used": "6"}
    with av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libvpx-vp9", rate=Fraction(frame_rate), options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.codec_context.thread_count = "yuv420p", 1
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def write_picture(path: Path, pixels: np.ndarray) -> None:
    """Write uint8 [Y, X, 3] as PNG."""
    from PIL import Image

    Image.fromarray(pixels).save(path, format="PNG")


def write_attribution(target: Path, about: str, unpacked: Path, packages: Iterable[str]) -> None:
    """Start target/ATTRIBUTION.md with a line about the source and its Debian packages' full copyright files."""
    text = f"# {target.name}\n\n{about}\n"
    for package in packages:
        folder = unpacked / "usr/share/doc" / package
        if folder.is_symlink():  # another package of the source provides the notice
            continue
        notice = (folder / "copyright").read_text(encoding="utf-8", errors="replace").rstrip()
        text += f"\nFrom the Debian package `{package}`:\n\n```\n{notice}\n```\n"
    (target / ATTRIBUTION).write_text(text, encoding="utf-8")


def append_credits(target: Path, lines: Iterable[str]) -> None:
    """Add a paragraph to the attribution of the source being written to `target`, such as the names of authors."""
    with (target / ATTRIBUTION).open("a", encoding="utf-8") as file:
        file.write("\n" + "\n".join(lines) + "\n")
