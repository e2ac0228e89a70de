"""Tiny 3D media for the tests: coloured boxes and spheres as real files and shards."""

from pathlib import Path

import numpy as np
import trimesh

from megamm.media.point_clouds import cloud_from_mesh
from megamm.media.points_file import write_cloud
from megamm.shards.folder import ShardWriter

COLOURS = {"red": (255, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


def solid(number: int) -> tuple[trimesh.Trimesh, str]:
    """Return a box or a ball of one colour, as a function of the number."""
    rng = np.random.default_rng(number)
    name = list(COLOURS)[rng.integers(len(COLOURS))]
    if rng.integers(2):
        mesh, kind = trimesh.creation.box(extents=rng.uniform(0.3, 1.0, 3)), "box"
    else:
        mesh, kind = trimesh.creation.icosphere(subdivisions=2, radius=rng.uniform(1, 9)), "ball"
    mesh.visual.vertex_colors = np.tile(np.uint8([*COLOURS[name], 255]), (len(mesh.vertices), 1))
    return mesh, f"a {name} {kind}"


def as_bytes(mesh: trimesh.Trimesh, kind: str) -> bytes:
    """Return the file a user would have; "npz": a cloud of 512 points."""
    if kind == "npz":
        return write_cloud(cloud_from_mesh(mesh, 512, seed=0))
    data = mesh.export(file_type=kind)
    return data.encode() if isinstance(data, str) else data


def ply_cloud(count: int, colours: bool = True) -> bytes:
    """Return a binary ply file without faces: points of a ball with normals, as scanners and Open3D write them."""
    cloud = cloud_from_mesh(trimesh.creation.icosphere(subdivisions=2), count, seed=0)
    names = ["float x", "float y", "float z", "float nx", "float ny", "float nz"]
    fields = [(name.split()[1], "<f4") for name in names]
    if colours:
        names += ["uchar red", "uchar green", "uchar blue"]
        fields += [(name.split()[1], "u1") for name in names[6:]]
    table = np.zeros(count, fields)
    for column, (name, _) in enumerate(fields):
        table[name] = cloud[:, column] if column < 6 else 30 * column
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {count}\n"
    header += "".join(f"property {name}\n" for name in names)
    header += "element face 0\nproperty list uchar int vertex_indices\nend_header\n"
    return header.encode() + table.tobytes()


def write_points(folder: Path, train: int, heldout: int) -> Path:
    """Write `folder/<split>/<modality>/` shards of text and points with the same keys; clouds and meshes in turn."""
    for split, numbers in (("train", range(train)), ("heldout", range(10_000, 10_000 + heldout))):
        with ShardWriter(folder / split / "text") as text, ShardWriter(folder / split / "points") as points:
            for n in numbers:
                mesh, caption = solid(n)
                kind = ("npz", "glb", "obj", "ply")[n % 4]
                text.add(f"s{n}", "txt", caption.encode())
                points.add(f"s{n}", kind, as_bytes(mesh, kind))
    return folder
