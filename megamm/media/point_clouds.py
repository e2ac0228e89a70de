"""Point clouds: sampled from the surface of meshes, uniform by area; normalised; rendered as pictures.

A cloud is float32 `[N, 9]`: x, y, z (the file's unit until `normalised`), unit normal, RGB in [0, 1] as the file
stores it (sRGB by convention). In: a loaded trimesh mesh or scene; untrusted files are loaded by media/points_file.py.
Source of the uniform sampling in a triangle: Osada et al. 2002, "Shape Distributions", section 4.2; triangles are
chosen by stratified sampling of their cumulative area.

A rendering is an orthographic view, uint8 `[size, size, 3]`, with numpy only: points are drawn as discs, nearest on top
(painter's algorithm), lit from the camera's upper left. The y axis points up. For a mesh, sample it densely once
(`cloud_from_mesh`) and render all views from that.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from megamm.media.image_colours import eight_bits

if TYPE_CHECKING:
    import trimesh
    from PIL.Image import Image

CloudArray = npt.NDArray[np.float32]
FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

MAX_COORDINATE = 1e12
"""Limit that keeps float32 far from overflow, even for products of three coordinates."""


class MeshInstance(NamedTuple):
    """One mesh of a scene, and its corners `[F, 3, 3]` in the scene's coordinates.

    orientation: -1 if its transform mirrors, so that the corners are listed clockwise; else 1.
    """

    mesh: "trimesh.Trimesh"
    corners: FloatArray
    orientation: int = 1


def cloud_from_mesh(mesh: "trimesh.Trimesh | trimesh.Scene", count: int, seed: int) -> CloudArray:
    """`count` points of the surface, float32 `[count, 9]`; the same mesh and seed give the same points.

    Normals are those of the faces, outward if the corners are listed counter-clockwise. Raises ValueError if there is
    no face, a coordinate is not finite, or the surface has no area.
    """
    instances = mesh_instances(mesh)
    if not instances:
        raise ValueError("has no faces")
    corners = np.concatenate([part.corners for part in instances])
    if not (np.abs(corners) < MAX_COORDINATE).all():
        raise ValueError("has coordinates that are NaN, Inf or too large")
    # The cross product of two edges is normal to the face, with twice its area as length.
    doubled = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    twice_area = np.linalg.norm(doubled, axis=1)
    below = np.cumsum(twice_area)
    if not (np.isfinite(below[-1]) and below[-1] > 0):
        raise ValueError("its surface has no area")
    random = np.random.default_rng(seed)
    # One sample in each of `count` equal strata of the cumulative area: more even than independent samples.
    strata = (np.arange(count) + random.random(count)) / count * below[-1]
    face = np.searchsorted(below, strata, side="right").clip(max=len(below) - 1)
    face = np.where(twice_area[face] > 0, face, int(twice_area.argmax()))  # rounding can select an empty last face
    # The square root makes points uniform in the triangle; without it they would gather at the first corner.
    root, share = np.sqrt(random.random(count)), random.random(count)
    weights = np.stack([1 - root, root * (1 - share), root * share], axis=1)
    xyz = (corners[face] * weights[:, :, None]).sum(1)
    turned = np.repeat([part.orientation for part in instances], [len(part.corners) for part in instances])
    normal = doubled[face] / twice_area[face, None] * turned[face, None]
    return np.concatenate([xyz, normal, _colours(instances, face, weights)], axis=1).astype(np.float32)


def mesh_instances(mesh: "trimesh.Trimesh | trimesh.Scene") -> list[MeshInstance]:
    """The meshes with faces of a scene, in its order, repeated as often as the scene places them."""
    import trimesh

    if isinstance(mesh, trimesh.Trimesh):
        return [MeshInstance(mesh, mesh.vertices[mesh.faces].astype(np.float64))] if len(mesh.faces) else []
    instances = []
    for node in mesh.graph.nodes_geometry:
        transform, name = mesh.graph[node]
        part = mesh.geometry[name]
        if isinstance(part, trimesh.Trimesh) and len(part.faces):
            vertices = part.vertices @ transform[:3, :3].T + transform[:3, 3]
            mirrors = np.linalg.det(transform[:3, :3]) < 0
            instances.append(MeshInstance(part, vertices[part.faces].astype(np.float64), -1 if mirrors else 1))
    return instances


def _colours(instances: list[MeshInstance], face: IntArray, weights: FloatArray) -> FloatArray:
    """RGB `[N, 3]` in [0, 1] at barycentric `weights` `[N, 3]` of `face` `[N]`, numbered over all meshes."""
    colours = np.empty((len(face), 3))
    first = 0
    for part, *_ in instances:
        # Faces are numbered through all instances; this instance has the numbers from `first` on.
        mine = (face >= first) & (face < first + len(part.faces))
        if mine.any():
            colours[mine] = _mesh_colours(part, face[mine] - first, weights[mine])
        first += len(part.faces)
    return colours.clip(0, 1)


def _mesh_colours(mesh: "trimesh.Trimesh", face: IntArray, weights: FloatArray) -> FloatArray:
    """The texture if there is one, else the colours of vertices, faces or the material (trimesh's grey if none)."""
    from trimesh.visual import TextureVisuals

    visual, corners = mesh.visual, mesh.faces[face]
    if isinstance(visual, TextureVisuals):
        # A material's texture wins over its colour if texture coordinates exist for every vertex.
        image = texture(mesh)
        rgb = np.broadcast_to(visual.material.main_color, (len(face), 4))[:, :3] / 255
        # glTF multiplies the material's colour with those of the vertices, if a mesh has both.
        if (tint := visual.vertex_attributes.get("color")) is not None:
            rgb = rgb * (np.asarray(tint, dtype=np.float64)[corners, :3] * weights[:, :, None]).sum(1)
        if image is None or visual.uv is None or len(visual.uv) != len(mesh.vertices):
            return rgb
        uv = (np.asarray(visual.uv, dtype=np.float64)[corners] * weights[:, :, None]).sum(1)
        # Any program may write material names, so other ones are not an error.
        texel = _texels(np.asarray(eight_bits(image).convert("RGB")), wrapped(uv, visual.material.name)) / 255
        # glTF's factor tints the texture; an OBJ material's diffuse colour is only for programs without textures.
        return texel * rgb if hasattr(visual.material, "baseColorFactor") else texel
    assert visual is not None, "trimesh always sets visual"
    if visual.kind == "vertex":
        return (visual.vertex_colors[corners, :3] / 255 * weights[:, :, None]).sum(1)
    return visual.face_colors[face, :3] / 255


def texture(mesh: "trimesh.Trimesh") -> "Image | None":
    """The picture that colours a mesh, possibly not decoded yet; None if it has none."""
    material = getattr(mesh.visual, "material", None)
    return getattr(material, "baseColorTexture", None) or getattr(material, "image", None)


def wrapped(uv: FloatArray, wrapping: str | None) -> FloatArray:
    """Texture coordinates `[N, 2]` inside the picture, [0, 1]; wrapping: of u and v, such as "repeat clamp"."""
    uv = np.nan_to_num(uv, posinf=0, neginf=0)
    modes = (wrapping or "").split()
    modes = modes if len(modes) == 2 else ["repeat", "repeat"]
    inside = {"clamp": uv.clip(0, 1), "mirror": 1 - np.abs(uv % 2 - 1)}
    return np.stack([inside.get(mode, uv % 1)[:, axis] for axis, mode in enumerate(modes)], axis=1)


def _texels(picture: npt.NDArray[np.uint8], uv: FloatArray) -> npt.NDArray[np.uint8]:
    """The nearest pixel `[N, 3]` of `[Y, X, 3]` at texture coordinates `[N, 2]` in [0, 1]; v is up."""
    height, width = picture.shape[:2]
    u, v = uv.T
    column = (u * width).astype(np.int64).clip(max=width - 1)
    row = ((1 - v) * height).astype(np.int64).clip(max=height - 1)
    return picture[row, column]


def normalised(cloud: CloudArray) -> CloudArray:
    """Move the bounding box's centre to the origin and scale its longest side to 2, so that xyz is in [-1, 1].

    Raises ValueError if the points have no extent.
    """
    xyz = cloud[:, :3].astype(np.float64)
    low, high = xyz.min(0), xyz.max(0)
    side = (high - low).max()
    if not side > 0:
        raise ValueError("all points are at the same place")
    moved = ((xyz - (low + high) / 2) * (2 / side)).clip(-1, 1)
    return np.concatenate([moved.astype(np.float32), cloud[:, 3:]], axis=1)


ELEVATION = math.radians(20)
"""The camera looks down at this angle, so that the tops of things are visible."""
LIGHT = np.array([-0.4, 0.6, 0.7]) / math.sqrt(0.4**2 + 0.6**2 + 0.7**2)
"""Direction to the light, in camera axes: right, up, towards the viewer."""
AMBIENT = 0.45
FILL = 0.95
"""Share of the picture that the cloud's bounding sphere spans: the scale is the same at every angle."""
SUPERSAMPLING = 2
COVER = 6.0
"""Total area of the discs' bounding squares, in pictures: enough to close the surface."""


def render(cloud: CloudArray, angle: float, size: int) -> npt.NDArray[np.uint8]:
    """One picture on white, uint8 `[size, size, 3]`; angle: rotation of the cloud about the y axis in degrees.

    The cloud need not be normalised: its bounding box is centred and scaled.
    """
    # Antialiasing: draw larger, then average blocks of pixels.
    fine = size * SUPERSAMPLING
    camera = _camera(math.radians(angle))
    xyz = cloud[:, :3] - (cloud[:, :3].min(0) + cloud[:, :3].max(0)) / 2
    radius = max(float(np.linalg.norm(xyz, axis=1).max()), 1e-12)
    x, y, depth = (xyz @ camera.T * (FILL * fine / 2 / radius)).T.astype(np.float32)
    # A stable sort, so that equal depths are drawn in the same order on every platform.
    far_first = np.argsort(depth, kind="stable")
    # Fewer points need larger discs to close the surface; a disc spans at most 1/16 of the picture.
    width = int(np.clip(round(fine * math.sqrt(COVER / len(cloud))), 1, fine // 16 + 1))
    offset = np.mgrid[:width, :width].reshape(2, -1) - (width - 1) / 2
    across, down = offset[:, np.hypot(*offset) <= width / 2]
    column = np.floor(fine / 2 + x[far_first, None] + across).astype(np.int64)
    row = np.floor(fine / 2 - y[far_first, None] + down).astype(np.int64)
    pixel = row.clip(0, fine - 1) * fine + column.clip(0, fine - 1)
    light = AMBIENT + (1 - AMBIENT) * np.abs(cloud[:, 3:6] @ (LIGHT @ camera))  # both sides: orientation is unreliable
    colour = (cloud[:, 6:9] * light[:, None]).clip(0, 1)[far_first]
    nearest = np.full(fine * fine, -1, dtype=np.int64)
    # For repeated indices the last assignment wins: the nearest point.
    nearest[pixel.ravel()] = np.repeat(np.arange(len(cloud)), pixel.shape[1])
    picture = np.where(nearest[:, None] >= 0, colour[nearest], 1.0)
    blocks = picture.reshape(size, SUPERSAMPLING, size, SUPERSAMPLING, 3)
    return (blocks.mean(1).mean(2) * 255).round().astype(np.uint8)  # one axis at a time is three times as fast


def _camera(angle: float) -> npt.NDArray[np.float64]:
    """Rows: the camera's right, up and towards-the-viewer axes in the cloud's coordinates."""
    sin, cos = math.sin(angle), math.cos(angle)
    turn = np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])
    sin, cos = math.sin(ELEVATION), math.cos(ELEVATION)
    return np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]) @ turn
