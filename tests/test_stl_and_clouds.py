"""STL files are read facet by facet, PLY files without faces as clouds.

Expected values: those of trimesh's own readers for files that it reads right, else computed by hand.
"""

import io
import struct

import numpy as np
import pytest
import trimesh
from audio_data import as_mpeg4, chirp
from points_data import ply_cloud, solid
from trimesh.exchange.stl import export_stl_ascii

from megamm.common.errors import UnreadableMedia
from megamm.data.build.shards import BuildOptions, build
from megamm.media.points_file import digest_of_points, read_mesh, read_points, write_cloud
from megamm.shards.folder import ShardFolder

MESH = solid(2)[0]
BINARY = MESH.export(file_type="stl")
TEXT = export_stl_ascii(MESH)
FACETS = len(MESH.faces)


def triangles(data):
    (mesh,) = read_mesh(data, "stl").dump()
    return mesh.triangles


def with_count(count, data=BINARY):
    return data[:80] + struct.pack("<I", count) + data[84:]


def test_both_forms_are_read_as_trimesh_reads_them():
    for data in (BINARY, TEXT.encode()):
        expected = trimesh.load_mesh(io.BytesIO(data), file_type="stl", process=False).triangles
        np.testing.assert_array_equal(triangles(data), expected)
        assert expected.shape == (FACETS, 3, 3)
    normals = read_points(BINARY, "stl", 64)[0, :, 3:6]
    assert (np.sum(normals * read_points(BINARY, "stl", 64)[0, :, :3], 1) > 0).all()  # outward


def test_the_facets_of_a_binary_stl_count_and_not_its_header():
    for count in (0, 0xFFFFFFFF):  # of programs that write to a pipe
        assert len(triangles(with_count(count))) == FACETS
    named = b"solid of a program".ljust(80) + BINARY[80:]
    assert digest_of_points(named, "stl") == digest_of_points(BINARY, "stl")
    without_normals = bytearray(BINARY)
    for facet in range(FACETS):
        without_normals[84 + 50 * facet : 96 + 50 * facet] = bytes(12)
    assert digest_of_points(bytes(without_normals), "stl") == digest_of_points(BINARY, "stl")


def test_names_and_several_solids_of_a_text_stl_hide_no_facet():
    """Trimesh looks for the words: a name that has one of them ends or moves a solid there."""
    named = TEXT.replace("solid", "solid vertex_holder solid", 1)
    assert len(triangles(named.encode())) == FACETS
    assert len(triangles((TEXT + "\n" + named).encode())) == 2 * FACETS
    assert len(triangles(TEXT.upper().encode())) == len(triangles(TEXT.replace("\n", "\r\n").encode())) == FACETS


FACET = "facet normal 0 0 1\nouter loop\nvertex 0 0 0\nvertex 1 0 0\nvertex 0 1 0\nendloop\nendfacet\n"
BROKEN_STL = {
    "truncated": (BINARY[:-1], f"truncated: {FACETS} facets declared"),
    "fewer declared": (with_count(3), "has data after its last facet: 3 facets declared"),
    "a placeholder and half a facet": (with_count(0)[:-20], "has data after its last facet"),
    "no facets": (with_count(0)[:84], "has no faces"),
    "empty": (b"", "too short"),
    "text without its end": (TEXT[:-20].encode(), "truncated: its last facet has no end"),
    "text within a facet": (TEXT[: len(TEXT) // 2].encode(), "."),
    "a quadrangle": (
        f"solid\n{FACET.replace('endloop', 'vertex 1 1 0' + chr(10) + 'endloop')}endsolid\n".encode(),
        "tri",
    ),
    "two coordinates": (
        f"solid\n{FACET.replace('vertex 1 0 0', 'vertex 1 0')}endsolid".encode(),
        "line 5 cannot follow",
    ),
    "an unknown line": (f"solid\ncolor 1 0 0\n{FACET}endsolid\n".encode(), "line 2 cannot follow"),
    "no number": (f"solid\n{FACET.replace('vertex 1', 'vertex x')}endsolid".encode(), "could not convert"),
    "NaN": (f"solid\n{FACET.replace('vertex 1', 'vertex nan')}endsolid".encode(), "NaN, Inf"),
    "text without facets": (b"solid a\nendsolid a\n", "has no faces"),
}


@pytest.mark.parametrize("what", BROKEN_STL)
def test_a_broken_stl_is_refused_with_the_reason(what):
    data, reason = BROKEN_STL[what]
    for read in (lambda: digest_of_points(data, "stl"), lambda: read_points(data, "stl", 8)):
        with pytest.raises(UnreadableMedia, match=reason) as error:
            read()
        assert "\n" not in str(error.value)


def test_a_ply_without_faces_is_the_cloud_that_trimesh_reads():
    for data in (ply_cloud(300), ply_cloud(300).replace(b"element face 0\n", b"element camera 0\n")):
        cloud = read_mesh(data, "ply")
        expected = trimesh.load(io.BytesIO(data), file_type="ply")
        assert isinstance(expected, trimesh.PointCloud) and cloud.shape == (300, 9)
        np.testing.assert_array_equal(cloud[:, :3], expected.vertices.astype(np.float32))
        np.testing.assert_allclose(cloud[:, 6:] * 255, expected.colors[:, :3], atol=1e-4)
        # The same cloud as npz is the same sample.
        assert digest_of_points(data, "ply") == digest_of_points(write_cloud(cloud), "npz")
        points = read_points(data, "ply", 64, draws=2)
        assert points.shape == (2, 64, 9) and len({tuple(point) for point in points.reshape(-1, 9).tolist()}) == 128
    grey = read_mesh(ply_cloud(300, colours=False), "ply")
    np.testing.assert_allclose(grey[:, 6:] * 255, np.broadcast_to(102.0, (300, 3)), atol=1e-4)


def text_ply(*rows, names="x y z nx ny nz", element=""):
    """Points with their properties; `element`: of another kind, with one member of one number."""
    properties = "".join(f"property float {name}\n" for name in names.split())
    head = f"ply\nformat ascii 1.0\nelement vertex {len(rows)}\n{properties}"
    head += f"element {element} 1\nproperty int a\n" if element else ""
    return (head + "end_header\n" + "\n".join([*rows, "1"] if element else rows) + "\n").encode()


def test_normals_of_a_cloud_get_length_1():
    cloud = read_mesh(text_ply("0 0 0 0 0 2", "1 0 0 0 -0.5 0", "0 1 0 3 4 0"), "ply")
    np.testing.assert_allclose(cloud[:, 3:6], [[0, 0, 1], [0, -1, 0], [0.6, 0.8, 0]], rtol=1e-6)


BROKEN_CLOUDS = {
    "no normals": (text_ply("0 0 0", "1 0 0", names="x y z"), "no normals"),
    "splats, whose normals are zero": (text_ply("0 0 0 0 0 0", "1 0 0 0 0 0"), "normals that are zero"),
    "NaN normals": (text_ply("0 0 0 nan 0 0", "1 0 0 0 0 1"), "normals that are zero, NaN"),
    "infinite points": (text_ply("inf 0 0 0 0 1", "1 0 0 0 0 1"), "coordinates that are NaN, Inf"),
    "one point": (text_ply("1 1 1 0 0 1"), "same place"),
    "lines": (text_ply("0 0 0 0 0 1", "1 1 1 0 0 1", element="edge"), "edge elements"),
    "strips": (text_ply("0 0 0 0 0 1", element="tristrips"), "tristrips elements"),
    "no points": (text_ply(), "has no vertices"),
    "truncated": (ply_cloud(300)[:-1], "truncated"),
    "a point more": (ply_cloud(300) + bytes(27) + b"x", "data after its last element"),
}


@pytest.mark.parametrize("what", BROKEN_CLOUDS)
def test_a_cloud_that_cannot_be_used_whole_is_refused(what):
    data, reason = BROKEN_CLOUDS[what]
    with pytest.raises(UnreadableMedia, match=reason):
        digest_of_points(data, "ply")


def test_new_formats_are_built_from_a_folder(tmp_path):
    """Clouds and meshes of one extension are mixed; .m4b is another name of .m4a."""
    files = {
        "mesh.stl": BINARY,
        "scan.ply": ply_cloud(300),
        "box.ply": solid(3)[0].export(file_type="ply"),
        "memo.m4a": as_mpeg4(chirp(1), "m4a"),
        "book.m4b": as_mpeg4(chirp(2), "m4a"),
        "radio.aac": as_mpeg4(chirp(3), "aac"),
        "splat.ply": BROKEN_CLOUDS["splats, whose normals are zero"][0],
    }
    raw = tmp_path / "raw"
    raw.mkdir()
    for name, data in files.items():
        (raw / name).write_bytes(data)
        (raw / name).with_suffix(".txt").write_text(f"the sound or shape of a {name}")
    (report,) = build([raw], tmp_path / "shards", BuildOptions(form="folder", heldout=0, max_broken=1))
    built = {m: ShardFolder(tmp_path / "shards" / "raw" / "train" / m) for m in ("audio", "points", "text")}
    assert sorted(built["audio"].extensions) == ["aac", "m4a", "m4a"]
    assert sorted(built["points"].extensions) == ["ply", "ply", "stl"]
    assert report.train == len(built["text"]) == 6
    (entry,) = report.left_out["broken"]
    assert entry["what"].endswith("splat.ply") and "normals that are zero" in entry["reason"]
