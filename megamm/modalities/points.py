"""3D: clouds (npz) and meshes (glb, obj, ply) <-> float32 `[N, 9]` <-> token ids `[T]`.

A cloud is xyz, unit normal and RGB in [0, 1] (data/meshes.py), read with the centre of its bounding box at the origin
and its longest side 2. A mesh is sampled uniformly by area; a cloud with more than N points is thinned, one with fewer
is repeated, at random with a seed from the file's hash: the same file always gives the same points.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from megamm.codecs.folders import load_codec
from megamm.codecs.points import KIND, PointsCodec, quantile_of_patch
from megamm.data.mesh_files import MESH_EXTENSIONS, read_cloud, read_mesh, write_cloud
from megamm.data.meshes import CloudArray, cloud_from_mesh, normalised
from megamm.data.sample import IntArray
from megamm.modalities.base import CPU, UnreadableMedia

_DIGEST_POINTS = 4096
"""Points of a mesh for its digest: one surface can have many forms (formats, orders of its parts' bytes)."""


class PointsModality:
    """The points modality; build it with `PointsModality.load(folder)`."""

    name: ClassVar[str] = "points"
    family: ClassVar[str] = "points"
    extensions: ClassVar[tuple[str, ...]] = ("npz", *MESH_EXTENSIONS)

    def __init__(self, codec: PointsCodec, codec_id: str, device: torch.device) -> None:
        self.codec = codec.to(device).eval()
        self.codec_id = codec_id
        self.device = device
        self.vocabulary_size = codec.config.vocabulary_size
        self.tokens_per_item: int | None = codec.tokens
        self.stride = codec.tokens

    @classmethod
    def load(cls, codec: Path, device: torch.device = CPU) -> "PointsModality":
        """Load a points codec folder onto a device. Raises UserError if it is not one."""
        module, codec_id = load_codec(codec, {KIND: PointsCodec}, "points")
        return cls(module, codec_id, device)

    @staticmethod
    def check_media(data: bytes, extension: str) -> str:
        """Digest of the cloud, or of points of the mesh with a fixed seed. Raises UnreadableMedia if unusable."""
        cloud = _read(data, extension, _DIGEST_POINTS, seed=0)
        _readable(normalised, cloud)
        return hashlib.sha256(cloud.tobytes()).hexdigest()

    def read_media(self, data: bytes, extension: str) -> CloudArray:
        """Media bytes to a normalised cloud of the codec's N points, `[N, 9]`."""
        return read_points(data, extension, self.codec.points)[0]

    def write_media(self, media: CloudArray) -> bytes:
        """Cloud `[N, 9]` to npz bytes."""
        return write_cloud(media)

    def encode(self, media: Sequence[CloudArray]) -> list[IntArray]:
        """Clouds `[N, 9]` to ids `[T]` each, on the codec's device."""
        if not media:
            return []
        return list(self.codec.encode(torch.from_numpy(np.stack(media)).to(self.device)).cpu().numpy())

    def decode(self, ids: IntArray) -> CloudArray:
        """Ids `[T]` to a cloud `[N, 9]`. Raises ValueError if T is not the codec's or an id is invalid at its place."""
        clouds = self.codec.decode(torch.from_numpy(np.ascontiguousarray(ids, dtype=np.int64))[None].to(self.device))
        return clouds[0].cpu().numpy()

    def positions(self, length: int) -> IntArray:
        """`[3, length]`: t counts the tokens; (h, w) are the quantiles of height and width of the patch."""
        height, width, _ = quantile_of_patch(self.codec.config.patches)[:, np.arange(length) // 2]
        return np.stack([np.arange(length), height, width])

    def choices(self, place: int) -> range:
        """Cells at even places, shapes at odd ones."""
        return self.codec.choices(place)


def read_points(data: bytes, extension: str, count: int, draws: int = 1) -> CloudArray:
    """Media bytes to normalised clouds `[draws, count, 9]`. Raises UnreadableMedia if broken.

    The draws share no point if the media has enough points; the first is the same for any number of draws.
    """
    seed = int.from_bytes(hashlib.sha256(data).digest()[:8], "little")
    if extension in MESH_EXTENSIONS:
        mesh = _readable(read_mesh, data, extension)
        clouds = [_readable(cloud_from_mesh, mesh, count, seed + draw) for draw in range(draws)]
        return np.stack([_readable(normalised, cloud) for cloud in clouds])
    cloud = _readable(normalised, _read(data, extension, count, seed))
    random = np.random.default_rng(seed)
    rounds = -(-draws * count // len(cloud))
    chosen = np.concatenate([random.permutation(len(cloud)) for _ in range(rounds)])
    return cloud[chosen[: draws * count]].reshape(draws, count, -1)


def _read(data: bytes, extension: str, count: int, seed: int) -> CloudArray:
    """A mesh as `count` points, a cloud unchanged; neither is normalised."""
    if extension == "npz":
        return _readable(read_cloud, data)
    if extension in MESH_EXTENSIONS:
        return _readable(cloud_from_mesh, _readable(read_mesh, data, extension), count, seed)
    raise UnreadableMedia(f"extension {extension!r} is not one of {', '.join(PointsModality.extensions)}")


def _readable(step: Callable[..., Any], *inputs: Any) -> Any:
    """Call `step` with its inputs; turn its ValueError into UnreadableMedia."""
    try:
        return step(*inputs)
    except ValueError as error:
        raise UnreadableMedia(str(error)) from error
