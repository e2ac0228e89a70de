"""Renders pictures of point clouds: float32 `[N, 9]` (media/meshes.py) -> uint8 `[size, size, 3]`, with numpy only.

Orthographic view; points are drawn as discs, nearest on top (painter's algorithm), lit from the camera's upper left.
The y axis points up. For a mesh, sample it densely once (`cloud_from_mesh`) and render all views from that.
"""

import math

import numpy as np
import numpy.typing as npt

from megamm.media.meshes import CloudArray

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
    fine = size * SUPERSAMPLING
    camera = _camera(math.radians(angle))
    xyz = cloud[:, :3] - (cloud[:, :3].min(0) + cloud[:, :3].max(0)) / 2
    radius = max(float(np.linalg.norm(xyz, axis=1).max()), 1e-12)
    x, y, depth = (xyz @ camera.T * (FILL * fine / 2 / radius)).T.astype(np.float32)
    far_first = np.argsort(depth, kind="stable")
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
