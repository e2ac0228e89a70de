"""Untrusted 3D files: npz or ply clouds and glb, obj, ply or stl meshes -> normalised point clouds, float32 `[N, 9]`.

glb is read as its specification says (media/gltf_file.py), polygons of obj and ply are split into triangles that cover
exactly them (media/polygon_files.py), and facets of stl are counted (media/stl_file.py). A mesh is whole or refused:
nothing of it is left out because it cannot be read. A ply file without faces is a cloud.

A mesh is sampled uniformly by area; a cloud with more than N points is thinned, one with fewer is repeated, at random
with a seed from the file's hash: the same file always gives the same points (media/point_clouds.py).

Counts are read from the headers and limited before anything is allocated. No other file is opened: material libraries
and texture files of obj and ply are ignored; a glb that needs another file is refused. No pickle is loaded.
"""

import hashlib
import io
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from megamm.common.errors import UnreadableMedia
from megamm.media.gltf_file import plain_glb
from megamm.media.point_clouds import CloudArray, cloud_from_mesh, normalised, texture
from megamm.media.polygon_files import mesh_of_obj, read_ply
from megamm.media.stl_file import mesh_of_stl

if TYPE_CHECKING:
    import trimesh

MESH_EXTENSIONS = ("glb", "obj", "ply", "stl")
POINTS_EXTENSIONS = ("npz", *MESH_EXTENSIONS)
MAX_POINTS = 4 * 2**20
"""Maximum points of a cloud; 144 MiB."""
MAX_ELEMENTS = 8 * 2**20
"""Maximum vertices, and indices, that a mesh file may declare in total, and maximum faces placed in its scene."""
MAX_TEXTURE_PIXELS = 64 * 2**20
ARRAY = "points"
_GLB = struct.Struct("<4sIIII")
_JSON = int.from_bytes(b"JSON", "little")
_DIGEST_POINTS = 4096
"""Points of a mesh for its digest: one surface can have many forms (formats, orders of its parts' bytes)."""


def digest_of_points(data: bytes, extension: str) -> str:
    """Digest of the cloud, or of points of the mesh with a fixed seed. Raises UnreadableMedia if unusable."""
    media = _read(data, extension)
    cloud = media if isinstance(media, np.ndarray) else _readable(cloud_from_mesh, media, _DIGEST_POINTS, 0)
    _readable(normalised, cloud)
    return hashlib.sha256(cloud.tobytes()).hexdigest()


def read_points(data: bytes, extension: str, count: int, draws: int = 1) -> CloudArray:
    """Media bytes to normalised clouds `[draws, count, 9]`. Raises UnreadableMedia if broken.

    The draws share no point if the media has enough points; the first is the same for any number of draws.
    """
    # The seed depends on the content only, not on name, order or process, so caches are reproducible.
    seed = int.from_bytes(hashlib.sha256(data).digest()[:8], "little")
    media = _read(data, extension)
    if not isinstance(media, np.ndarray):
        clouds = [_readable(cloud_from_mesh, media, count, seed + draw) for draw in range(draws)]
        return np.stack([_readable(normalised, cloud) for cloud in clouds])
    cloud = _readable(normalised, media)
    random = np.random.default_rng(seed)
    # Consecutive slices of whole permutations: no point repeats before all points are used.
    rounds = -(-draws * count // len(cloud))
    chosen = np.concatenate([random.permutation(len(cloud)) for _ in range(rounds)])
    return cloud[chosen[: draws * count]].reshape(draws, count, -1)


def _read(data: bytes, extension: str) -> "trimesh.Scene | CloudArray":
    """The scene or the cloud of a file; a cloud is not normalised."""
    if extension == "npz":
        return _readable(read_cloud, data)
    if extension in MESH_EXTENSIONS:
        return _readable(read_mesh, data, extension)
    raise UnreadableMedia(f"extension {extension!r} is not one of {', '.join(POINTS_EXTENSIONS)}")


def _readable(step: Callable[..., Any], *inputs: Any) -> Any:
    """Call `step` with its inputs; turn its ValueError into UnreadableMedia."""
    try:
        return step(*inputs)
    except ValueError as error:
        raise UnreadableMedia(str(error)) from error


def read_cloud(data: bytes) -> CloudArray:
    """The array `points` of npz bytes, float32 `[M, 9]`: finite, normals of length 1, RGB in [0, 1]."""
    cloud = _read_npz(data)
    if not np.isfinite(cloud).all():
        raise ValueError("has values that are NaN or Inf")
    if (np.abs(np.linalg.norm(cloud[:, 3:6].astype(np.float64), axis=1) - 1) > 0.01).any():
        raise ValueError("has normals that are not of length 1")
    # 0.001 beyond [0, 1] is allowed for rounding.
    if (np.abs(cloud[:, 6:] - 0.5) > 0.501).any():
        raise ValueError("has colours outside [0, 1]")
    return cloud


def write_cloud(cloud: CloudArray) -> bytes:
    """Write `[M, 9]` as npz bytes. The same cloud gives the same bytes; numpy's own writer would store the time."""
    array, file = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array(array, np.ascontiguousarray(cloud, dtype=np.float32), allow_pickle=False)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo(f"{ARRAY}.npy"), array.getvalue(), compress_type=zipfile.ZIP_DEFLATED)
    return file.getvalue()


def _read_npz(data: bytes) -> CloudArray:
    """The array of an npz file, `[M, 9]`, checked for shape and size only. Raises ValueError if it is not one."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            member = archive.getinfo(f"{ARRAY}.npy")
            # 36 bytes per point (nine float32), and at most 4 kB for numpy's header.
            if member.file_size > MAX_POINTS * 36 + 4096:
                raise ValueError(f"declares more than {MAX_POINTS} points")
            array = archive.read(member)  # zipfile stops at the declared size, which was checked
        file = io.BytesIO(array)
        version = np.lib.format.read_magic(file)
        # The header is parsed without creating an array, so a false shape allocates nothing.
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = header(file)
    except (zipfile.BadZipFile, zlib.error, OSError, KeyError, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"not an npz file with the array {ARRAY!r}: {error}") from error
    if len(shape) != 2 or shape[1] != 9 or dtype != np.dtype("<f4") or fortran_order:
        raise ValueError(f"the array {ARRAY!r} is {dtype} of shape {shape}, not float32 [M, 9] in row order")
    values = array[file.tell() :]
    if len(values) != shape[0] * 36 or not values:
        raise ValueError(f"the array {ARRAY!r} of {shape[0]} points holds {len(values)} bytes")
    return np.frombuffer(values, dtype="<f4").reshape(shape)


def read_mesh(data: bytes, extension: str) -> "trimesh.Scene | CloudArray":
    """The scene of a glb, obj, ply or stl file, with at least one face; with the colours that the file itself contains.

    A ply file without faces gives its cloud `[M, 9]`.
    """
    # The headers are checked before trimesh, which allocates what they declare.
    checks = {"glb": _check_glb, "ply": _check_ply, "obj": _check_obj}
    if extension in checks:
        checks[extension](data)
    if extension == "glb":
        data = plain_glb(data)
    try:
        with np.errstate(invalid="ignore"):  # NaN is refused below, so numpy need not warn of it
            scene = _load_scene(data, extension)
        if isinstance(scene, np.ndarray):
            if len(scene) > MAX_POINTS:
                raise ValueError(f"has {len(scene)} points, more than {MAX_POINTS}")
            return scene
        # A scene can place one mesh many times: count the faces as placed, as sampling does.
        instances = [scene.geometry[scene.graph[node][1]] for node in scene.graph.nodes_geometry]
        faces = sum(len(getattr(part, "faces", ())) for part in instances)
    except Exception as error:  # trimesh passes on the exceptions of its parsers
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"not a readable {extension} file: {kind}{error}") from error
    if faces == 0:
        raise ValueError("has no faces (store a point cloud as npz or ply)")
    if faces > MAX_ELEMENTS:
        raise ValueError(f"has {faces} faces, more than {MAX_ELEMENTS}")
    for part in scene.geometry.values():
        image = texture(part)
        if image is not None and image.width * image.height > MAX_TEXTURE_PIXELS:
            raise ValueError(f"has a texture of {image.width} x {image.height} pixels")
        try:
            if image is not None:
                image.load()  # a truncated picture fails here, not when its colours are wanted
        except Exception as error:
            raise ValueError(f"has a broken texture: {error}") from error
    return scene


def _load_scene(data: bytes, extension: str) -> "trimesh.Scene | CloudArray":
    """The file's meshes as they are placed, with triangles only; or its cloud."""
    import trimesh

    if extension == "obj":
        return trimesh.Scene(mesh_of_obj(data))
    if extension == "ply":
        content = read_ply(data)
        return content if isinstance(content, np.ndarray) else trimesh.Scene(content)
    if extension == "stl":
        return trimesh.Scene(mesh_of_stl(data))
    return trimesh.load_scene(io.BytesIO(data), file_type=extension, resolver=None, process=False)


def _check_obj(data: bytes) -> None:
    """Check for faces: trimesh takes any text for an obj file. Elements are lines, so counts cannot be false."""
    if b"\0" in data or not re.search(rb"(?:^|[\r\n])[ \t]*fo?[ \t]", data):
        raise ValueError("has no faces")


def _check_ply(data: bytes) -> None:
    """Refuse a ply file whose header declares more elements than the file can hold."""
    # A header of ordinary files has less than 1 kB; 64 kB limit the search in a file without an end.
    header, end, _ = data[:65536].partition(b"end_header")
    if not header.startswith(b"ply") or not end:
        raise ValueError("not a ply file: no header")
    for line in header.decode("latin-1").splitlines():
        words = line.split()
        if words[:1] == ["element"] and not (len(words) == 3 and words[2].isdecimal()):
            raise ValueError(f"not a ply file: {line!r}")
        # Each element takes at least one byte, so the file's size limits the count.
        if words[:1] == ["element"] and int(words[2]) > min(MAX_ELEMENTS, len(data)):
            raise ValueError(f"declares {words[2]} elements {words[1]!r} in {len(data)} bytes")


def _check_glb(data: bytes) -> None:
    """Refuse a glb with impossible counts, references to other files, or nodes that do not form a tree."""
    if len(data) < _GLB.size:
        raise ValueError("not a glb file: too short")
    magic, version, _, length, kind = _GLB.unpack_from(data)
    if magic != b"glTF" or version != 2 or kind != _JSON or _GLB.size + length > len(data):
        raise ValueError("not a glb file of version 2: wrong or truncated header")
    try:
        header = json.loads(data[_GLB.size : _GLB.size + length])
        for part in [*header.get("buffers", []), *header.get("images", [])]:
            # A missing uri means the glb's own binary chunk.
            if not str(part.get("uri", "data:")).startswith("data:"):
                raise ValueError("refers to another file")
        counts = [accessor["count"] for accessor in header.get("accessors", [])]
        primitives = [primitive for mesh in header.get("meshes", []) for primitive in mesh["primitives"]]
        used = [index for primitive in primitives for index in primitive["attributes"].values()]
        used += [primitive["indices"] for primitive in primitives if "indices" in primitive]
        claimed = max(sum(counts), sum(counts[index] for index in used))  # one can be used many times, or never
        children = [child for node in header.get("nodes", []) for child in node.get("children", [])]
        roots = [node for scene in header.get("scenes", []) for node in scene.get("nodes", [])]
    except (KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ValueError(f"not a glb file: broken header: {type(error).__name__}: {error}") from error
    if claimed > 8 * MAX_ELEMENTS:  # positions, normals, coordinates of textures, ... and indices
        raise ValueError(f"declares {claimed} elements, more than {8 * MAX_ELEMENTS}")
    # With two parents of a node, or a cycle, a small file could place a mesh exponentially or infinitely often.
    if len(set(children)) != len(children) or set(children) & set(roots):
        raise ValueError("its nodes do not form a tree")
