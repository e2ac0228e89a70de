"""Fuzz the decoders of untrusted media: mutated valid files of every extension of the registry.

    python tests/fuzz_media.py --seconds 300 --seed 1

Each input is a valid file (tests/lib/fuzz_seeds.py) after one to three mutations that know the structure of files:
flipped bits, integers set to limits in either byte order, a cut, a range that is removed, repeated, zeroed or moved,
two files joined. Rules, for reading and for checking a file:

- No crash: the result is media or UnreadableMedia with one line. Any other exception is a failure.
- No hang: an input takes at most LIMIT seconds; a process that dies or is stuck is reported with its input.
- No silent shortening: what is accepted is not shorter than what FFmpeg (sound, video) decodes without an error, has
  the size that Pillow reports (image), and as many points of a cloud, or faces with an area, as trimesh finds, or the
  same surface (points).

Failures are written to out/fuzz/ with the seed and number; the exit code is 1 if there is any.
"""

import argparse
import collections
import faulthandler
import io
import os
import random
import re
import struct
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent / "lib"))

import numpy as np
from fuzz_seeds import seeds

from megamm.common.errors import UnreadableMedia
from megamm.data.build.curation import MEDIA_CHECKS, CurationOptions, FilteredOut
from megamm.modalities import REGISTRY

if TYPE_CHECKING:
    import numpy.typing as npt
    import trimesh

LIMIT = 60.0
"""Seconds that one input may take on a busy machine."""
LIMITS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
LOUD = 0.25
"""Seconds of sound by which a decoder may differ from FFmpeg: delays and padding of lossy formats."""


def mutated(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """Return the file after one to three mutations; `other` is another valid file of the same extension."""
    for _ in range(draw.randint(1, 3)):
        # Half of all mutations hit the first 256 or the last 256 bytes, where headers and indices are.
        near = draw.choice([range(len(data)), range(min(256, len(data))), range(max(0, len(data) - 256), len(data))])
        at = draw.choice(near) if near else 0
        span = draw.choice([1, 2, 4, 8, 64, max(1, len(data) // 8)])
        kind = draw.randrange(8)
        if kind == 0:
            data = data[:at] + bytes(b ^ 1 << draw.randrange(8) for b in data[at : at + 1]) + data[at + 1 :]
        elif kind == 1:
            form = draw.choice(["<H", ">H", "<I", ">I"])
            size = struct.calcsize(form)
            value = struct.pack(form, draw.choice(LIMITS) & (1 << 8 * size) - 1)
            data = data[:at] + value + data[at + size :]
        elif kind == 2:
            data = data[:at]
        elif kind == 3:
            data = data[:at] + data[at + span :]
        elif kind == 4:
            data = data[:at] + bytes(len(data[at : at + span])) + data[at + span :]
        elif kind == 5:
            data = data[:at] + data[at : at + span] * 2 + data[at + span :]
        elif kind == 6:
            piece = draw.randrange(max(1, len(other)))
            data = data[:at] + other[piece : piece + span] + data[at + span :]
        else:
            data = data + other if draw.random() < 0.5 else data[:at] + draw.randbytes(span) + data[at + span :]
    return data


def reference_seconds(data: bytes, demuxer: str, kind: str) -> float:
    """Return the seconds that FFmpeg decodes with default settings; 0 if it reports any error."""
    import av

    total = 0.0
    try:
        with av.open(io.BytesIO(data), format=demuxer, metadata_errors="replace") as container:
            stream = container.streams.best(kind)
            if stream is None:
                return 0.0
            stream.codec_context.options = {"err_detect": "explode", "max_pixels": "1000000"}
            for frame in container.decode(stream):
                if kind == "audio":
                    total += frame.samples / frame.sample_rate
                elif frame.pts is not None:
                    total = max(total, float(frame.pts * frame.time_base))
    except Exception:
        return 0.0
    return total


def shortened(name: str, extension: str, data: bytes) -> str | None:
    """Return how the accepted file is shorter than an independent reader finds it; None if it is not."""
    if name == "audio":
        from megamm.media.sound_file import read_waveform

        ours = len(read_waveform(data, extension, 16_000, 7200)) / 16_000
        if extension == "flac":
            # FFmpeg reads files behind each other as one, with some frames twice.
            theirs = sum(reference_seconds(b"fLaC" + part, "flac", "audio") for part in data.split(b"fLaC")[1:])
            return f"{ours:.2f} s, FFmpeg {theirs:.2f} s" if ours + LOUD < theirs else None
        theirs = reference_seconds(data, {"opus": "ogg", "m4a": "mp4"}.get(extension, extension), "audio")
        return f"{ours:.2f} s, FFmpeg {theirs:.2f} s" if ours + LOUD < theirs else None
    if name == "video":
        from megamm.media.video_file import shown_frames

        times = [shown.frame.pts * shown.frame.time_base for shown in shown_frames(data, extension)]
        demuxer = "matroska" if extension in ("mkv", "webm") else "mp4"
        theirs = reference_seconds(data, demuxer, "video")
        return f"{float(times[-1]):.2f} s, FFmpeg {theirs:.2f} s" if float(times[-1]) + 1e-3 < theirs else None
    if name == "image":
        from PIL import Image, ImageOps

        from megamm.media.image_file import decode_image

        theirs_size = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size
        ours_size = decode_image(data, extension).size
        return f"{ours_size}, Pillow {theirs_size}" if ours_size != theirs_size else None
    return shortened_mesh(extension, data) if name == "points" and extension != "npz" else None


def shortened_mesh(extension: str, data: bytes) -> str | None:
    """Return how a mesh has fewer faces than trimesh finds; a mutated file that trimesh refuses is not compared."""
    import trimesh

    from megamm.media.points_file import read_mesh

    # Trimesh counts negative indices from the file's last vertex, not from the last one before their line.
    if extension == "obj" and re.search(rb"^f .*-\d", data, re.MULTILINE):
        return None
    found = read_mesh(data, extension)
    is_cloud = isinstance(found, np.ndarray)
    ours = len(found) if is_cloud else surfaces(found)
    try:
        scene = trimesh.load_scene(io.BytesIO(data), file_type=extension, process=False, skip_materials=True)
        theirs = sum(len(cloud.vertices) for cloud in scene.geometry.values()) if is_cloud else surfaces(scene)
        # Trimesh's fans of concave outlines and of spikes have more triangles than the polygon needs.
        if not is_cloud and ours < theirs and np.allclose(vector_area(found), vector_area(scene), rtol=1e-6, atol=1e-9):
            return None
    except BaseException:  # trimesh raises what its parsers do
        return None
    return f"{ours} {'points' if is_cloud else 'faces'}, trimesh {theirs}" if ours < theirs else None


def surfaces(scene: "trimesh.Scene") -> int:
    """Return the number of faces that have an area: repeated corners give some that have none."""
    return sum(int((mesh.area_faces > 0).sum()) for mesh in scene.dump() if hasattr(mesh, "area_faces"))


def vector_area(scene: "trimesh.Scene") -> "npt.NDArray[np.float64]":
    """Return the sum of the faces' normals by area `[3]`, which does not depend on how polygons are split."""
    every = [mesh.triangles_cross.sum(0) / 2 for mesh in scene.dump() if hasattr(mesh, "triangles_cross")]
    return np.sum(every, axis=0)


def tried(name: str, extension: str, data: bytes) -> tuple[str, str]:
    """Return ("accepted" | "refused" | "failure", a line)."""
    try:
        REGISTRY[name].check_media(data, extension)
        if name in MEDIA_CHECKS:
            MEDIA_CHECKS[name](data, extension, CurationOptions())
    except FilteredOut as error:
        # `megamm data build` would skip the file, but not because it is broken.
        if "cannot be checked" in str(error):
            return "failure", f"readable, but {error}"
    except UnreadableMedia as error:
        line = str(error)
        return ("refused", line) if line and "\n" not in line else ("failure", f"not one line: {line!r}")
    except Exception as error:
        return "failure", f"{type(error).__name__}: {error}"
    try:
        found = shortened(name, extension, data)
    except UnreadableMedia as error:
        return "failure", f"checked, but cannot be read: {error}"
    except Exception as error:
        return "failure", f"{type(error).__name__}: {error}"
    return ("failure", f"silently shorter: {found}") if found else ("accepted", "")


def main() -> int:
    """Mutate until the time is over; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0, help="time limit")
    parser.add_argument("--seed", type=int, default=1, help="the same seed gives the same inputs in the same order")
    parser.add_argument("--only", default="", help="one extension")
    parser.add_argument("--out", type=Path, default=Path("out/fuzz"), help="folder for inputs that fail")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    kinds = [(n, e) for n, m in REGISTRY.items() if n != "text" for e in m.extensions if options.only in ("", e)]
    files = {kind: seeds(*kind) for kind in kinds}
    for (name, extension), valid in files.items():
        for data in valid:
            result = tried(name, extension, data)
            assert result[0] == "accepted", f"a seed of .{extension} is not valid: {result[1]}"
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    failures, number, end = [], 0, time.monotonic() + options.seconds
    options.out.mkdir(parents=True, exist_ok=True)
    while time.monotonic() < end:
        name, extension = kinds[number % len(kinds)]
        data = mutated(draw.choice(files[name, extension]), draw.choice(files[name, extension]), draw)
        path = options.out / f"seed{options.seed}_{number}.{extension}"
        # The input is on the disk before it is read: a decoder that kills the process leaves it there.
        path.write_bytes(data)
        begun = time.monotonic()
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        result, line = tried(name, extension, data)
        faulthandler.cancel_dump_traceback_later()
        counts[extension, result] += 1
        if result == "failure":
            failures.append(f"{path}: {line}")
            print(failures[-1], flush=True)
        else:
            path.unlink()
        assert time.monotonic() - begun < LIMIT
        number += 1
    print(f"seed {options.seed}: {number} inputs, {len(failures)} failures")
    for extension in dict.fromkeys(extension for _, extension in kinds):
        print(f"  .{extension}: {counts[extension, 'accepted']} accepted, {counts[extension, 'refused']} refused")
    return 1 if failures else 0


if __name__ == "__main__":
    # FFmpeg and libsndfile print about damage on the standard error; what fails is printed on the standard output.
    os.environ.setdefault("AV_LOG_LEVEL", "quiet")
    sys.exit(main())
