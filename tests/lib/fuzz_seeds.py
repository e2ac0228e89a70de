"""Valid files of every extension, small and of different structure, from which tests/fuzz_media.py starts."""

import io

import numpy as np
from codec_data import shape_picture, shape_video, video_bytes
from media_samples import example
from PIL import Image
from points_data import as_bytes as points_bytes
from points_data import ply_cloud, solid
from trimesh.exchange.stl import export_stl_ascii

CODECS = {"mp4": ["libvpx-vp9", "libx264"], "mov": ["libx264"], "webm": ["libvpx-vp9"], "mkv": ["libx264", "libvpx"]}
CONTAINERS = {"mkv": "matroska"}
PLANE = b"v 0 0 0\nv 2 0 0\nv 2 2 0\nv 1 .5 0\nv 0 2 0\nf 1 2 3 4 5\nf -5 -4 -3\n"
PLY = (
    b"ply\nformat ascii 1.0\nelement vertex 5\nproperty float x\nproperty float y\nproperty float z\nelement face 2\n"
    b"property list uchar int vertex_indices\nend_header\n0 0 0\n2 0 0\n2 2 0\n1 .5 0\n0 2 0\n5 0 1 2 3 4\n3 0 1 2\n"
)


def seeds(modality: str, extension: str) -> list[bytes]:
    """Return one or more valid files; an extension without its own line here takes the modality's example."""
    made = {"audio": _sounds, "video": _videos, "points": _points, "image": _images}
    found = made[modality](extension) if modality in made else []
    if not found:
        data, usual = example(modality, 1)
        if usual != extension:
            raise KeyError(f"tests/lib/fuzz_seeds.py has no file of .{extension}")
        found = [data]
    return found


def _sounds(extension: str) -> list[bytes]:
    from audio_data import FORMATS, as_bytes, as_mpeg4, chirp

    sound = chirp(1, seconds=2.0)
    if extension in ("m4a", "aac"):
        files = [as_mpeg4(sound, extension), as_mpeg4(np.stack([sound, 0.5 * sound], 1), extension)]
        if extension == "m4a":
            fragmented = as_mpeg4(sound, "m4a", movflags="frag_keyframe+empty_moov")
            files += [as_mpeg4(sound, "m4a", "alac"), fragmented]
        return files
    if extension not in FORMATS:
        return []
    other = np.random.default_rng(0).standard_normal((8000, 2)).astype(np.float32) * 0.1
    return [as_bytes(sound, extension), as_bytes(other, extension)]


def _videos(extension: str) -> list[bytes]:
    container = CONTAINERS.get(extension, extension)
    files = [video_bytes(shape_video(1, 9), container=container, codec=codec) for codec in CODECS.get(extension, [])]
    if extension == "mp4":
        files.append(video_bytes(shape_video(2, 6), codec="libx264", movflags="frag_keyframe+empty_moov"))
    return files


def _images(extension: str) -> list[bytes]:
    if extension == "heic":
        from pillow_heif import register_heif_opener

        register_heif_opener()
    kind = Image.registered_extensions().get(f".{extension}")
    if kind is None or kind not in Image.SAVE:
        return []
    picture, files = shape_picture(1)[0], []
    for mode in ("RGB", "L"):
        file = io.BytesIO()
        picture.convert(mode).save(file, format=kind)
        files.append(file.getvalue())
    return files


def _points(extension: str) -> list[bytes]:
    more = {"obj": [PLANE], "ply": [PLY, ply_cloud(200)]}.get(extension, [])
    if extension == "stl":
        more = [export_stl_ascii(solid(2)[0]).encode()]
    return [points_bytes(solid(1)[0], extension), *more]
