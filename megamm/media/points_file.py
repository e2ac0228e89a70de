"""Point clouds from files: npz clouds and glb, obj or ply meshes -> float32 `[N, 9]`, normalised (media/meshes.py).

A mesh is sampled uniformly by area; a cloud with more than N points is thinned, one with fewer is repeated, at random
with a seed from the file's hash: the same file always gives the same points.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from megamm.common.errors import UnreadableMedia
from megamm.media.mesh_file import MESH_EXTENSIONS, read_cloud, read_mesh
from megamm.media.meshes import CloudArray, cloud_from_mesh, normalised

POINTS_EXTENSIONS = ("npz", *MESH_EXTENSIONS)
_DIGEST_POINTS = 4096
"""Points of a mesh for its digest: one surface can have many forms (formats, orders of its parts' bytes)."""


def digest_of_points(data: bytes, extension: str) -> str:
    """Digest of the cloud, or of points of the mesh with a fixed seed. Raises UnreadableMedia if unusable."""
    cloud = _read(data, extension, _DIGEST_POINTS, seed=0)
    _readable(normalised, cloud)
    return hashlib.sha256(cloud.tobytes()).hexdigest()


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
    raise UnreadableMedia(f"extension {extension!r} is not one of {', '.join(POINTS_EXTENSIONS)}")


def _readable(step: Callable[..., Any], *inputs: Any) -> Any:
    """Call `step` with its inputs; turn its ValueError into UnreadableMedia."""
    try:
        return step(*inputs)
    except ValueError as error:
        raise UnreadableMedia(str(error)) from error
