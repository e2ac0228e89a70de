"""3D media: clouds and meshes are always read to the same normalised points; broken files are rejected."""

import builtins
import hashlib
import io
import json
import pickle
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from points_data import as_bytes, solid

from megamm.common.errors import UnreadableMedia
from megamm.media import points_file
from megamm.media.point_clouds import cloud_from_mesh
from megamm.media.points_file import read_points, write_cloud
from megamm.modalities.points import PointsModality
from megamm.tokenizers.io import save_codec
from megamm.tokenizers.points.model import PointsCodec, PointsCodecConfig

CONFIG = PointsCodecConfig(points=64, patches=8, cells=4, width=16, levels=(3, 3))
check = PointsModality.check_media


@pytest.fixture
def modality(tmp_path: Path) -> PointsModality:
    torch.manual_seed(0)
    save_codec(PointsCodec(CONFIG), tmp_path)
    return PointsModality.load(tmp_path)


@pytest.mark.parametrize("kind", PointsModality.extensions)
def test_every_format_gives_a_normalised_cloud_of_one_surface(kind: str, modality: PointsModality) -> None:
    box = trimesh.creation.box(extents=(2, 4, 8))
    box.visual.vertex_colors = np.tile(np.uint8([255, 51, 0, 255]), (8, 1))
    cloud = modality.read_media(as_bytes(box, kind), kind)
    assert cloud.shape == (64, 9) and cloud.dtype == np.float32
    distances = np.abs(np.abs(cloud[:, :3]) - [0.25, 0.5, 1])
    assert distances.min(1).max() < 0.05  # on a side; a few points do not reach the corners of the box exactly
    axis = distances.argmin(1)
    np.testing.assert_allclose(np.abs(cloud[np.arange(64), 3 + axis]), 1, atol=1e-4)
    assert np.abs(cloud[:, :3]).max() == pytest.approx(1, abs=1e-6)
    if kind not in ("obj", "stl"):  # whose materials are in another file, or which has no colours
        np.testing.assert_allclose(cloud[:, 6:] * 255, np.broadcast_to([255, 51, 0], (64, 3)), atol=0.6)
    np.testing.assert_array_equal(cloud, modality.read_media(as_bytes(box, kind), kind))


def test_written_clouds_are_the_same_bytes_and_read_back(modality: PointsModality) -> None:
    cloud = modality.read_media(as_bytes(solid(0)[0], "npz"), "npz")
    data = modality.write_media(cloud)
    assert data == modality.write_media(cloud.copy())
    time_of_day = [info.date_time for info in zipfile.ZipFile(io.BytesIO(data)).infolist()]
    assert time_of_day == [(1980, 1, 1, 0, 0, 0)]
    with np.load(io.BytesIO(data), allow_pickle=False) as file:  # numpy reads the data without it
        np.testing.assert_array_equal(file["points"], cloud)
    back = modality.read_media(data, "npz")
    assert {tuple(p) for p in back.round(5).tolist()} == {tuple(p) for p in cloud.round(5).tolist()}


def test_numpys_own_files_are_read() -> None:
    cloud = cloud_from_mesh(solid(1)[0], 100, seed=0)
    for save in (np.savez, np.savez_compressed):
        file = io.BytesIO()
        save(file, points=cloud, other=np.zeros(3))
        assert check(file.getvalue(), "npz") == check(write_cloud(cloud), "npz")


def test_the_digest_tells_surfaces_and_not_files() -> None:
    mesh, other = solid(2)[0], solid(3)[0]
    obj = as_bytes(mesh, "obj")
    assert check(obj, "obj") == check(b"# another comment\n" + obj, "obj")
    digests = {check(as_bytes(m, kind), kind) for m in (mesh, other) for kind in ("npz", "glb")}
    assert len(digests) == 4
    assert check(as_bytes(mesh, "npz"), "npz") == hashlib.sha256(cloud_from_mesh(mesh, 512, 0).tobytes()).hexdigest()


@pytest.mark.parametrize("kind", ["npz", "glb"])
def test_draws_share_no_point_and_the_first_stays(kind: str) -> None:
    data = as_bytes(solid(0)[0], kind)
    draws = read_points(data, kind, 128, draws=4)
    assert len(np.unique(draws.reshape(-1, 9), axis=0)) == 512
    np.testing.assert_array_equal(draws[0], read_points(data, kind, 128)[0])


def test_a_small_cloud_is_repeated_evenly(modality: PointsModality) -> None:
    cloud = cloud_from_mesh(solid(0)[0], 24, seed=0)
    points, times = np.unique(modality.read_media(write_cloud(cloud), "npz"), axis=0, return_counts=True)
    assert len(points) == 24 and set(times) == {2, 3}


def npz(array: object, name: str = "points", **options: object) -> bytes:
    file = io.BytesIO()
    np.savez(file, **{name: np.asarray(array, **options)})
    return file.getvalue()


def zipped(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("points.npy", data)
    return file.getvalue()


def npy_header(shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue()


GOOD = cloud_from_mesh(solid(0)[0], 32, seed=0)


def changed(channel: int, value: float) -> np.ndarray:
    cloud = GOOD.copy()
    cloud[3, channel] = value
    return cloud


BROKEN_CLOUDS = {
    "nothing": (b"", "not an npz"),
    "garbage": (b"\x07garbage" * 50, "not an npz"),
    "truncated": (write_cloud(GOOD)[:-40], "not an npz"),
    "damaged inside": (write_cloud(GOOD).replace(write_cloud(GOOD)[200:220], b"x" * 20), "not an npz"),
    "no array of that name": (npz(GOOD, "cloud"), "array 'points'"),
    "not an array": (zipped(b"hello"), "."),
    "double": (npz(GOOD, dtype=np.float64), "float64"),
    "six channels": (npz(GOOD[:, :6]), r"\(32, 6\)"),
    "no points": (npz(GOOD[:0]), "0 points"),
    "column order": (npz(np.asfortranarray(GOOD)), "row order"),
    "NaN": (npz(changed(0, np.nan)), "NaN or Inf"),
    "infinite": (npz(changed(2, np.inf)), "NaN or Inf"),
    "one place": (npz(np.repeat(GOOD[:1], 9, 0)), "the same place"),
    "long normal": (npz(changed(4, 5.0)), "normals"),
    "colours to 255": (npz(changed(7, 255.0)), "colours"),
    "absurd count": (zipped(npy_header((2**50, 9))), "holds 0 bytes"),
    "negative count": (zipped(npy_header((-1, 9)) + b"\0" * 36), "-1 points"),
    "mesh": (as_bytes(solid(0)[0], "glb"), "not an npz"),
}


@pytest.mark.parametrize("what", BROKEN_CLOUDS)
def test_broken_clouds_are_refused(what: str, modality: PointsModality) -> None:
    data, reason = BROKEN_CLOUDS[what]
    for read in (check, modality.read_media):
        with pytest.raises(UnreadableMedia, match=reason):
            read(data, "npz")


class Bomb:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("executed"),))


def test_a_pickle_is_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": (1, 9)})
    payload = pickle.dumps([Bomb()] * 9)
    for data in (zipped(header.getvalue() + payload), zipped(payload), payload):
        with pytest.raises(UnreadableMedia):
            check(data, "npz")
    assert not Path("executed").exists()


def test_a_zip_bomb_is_refused_before_it_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(points_file, "MAX_POINTS", 1000)
    bomb = zipped(npy_header((10_000, 9)) + bytes(360_000))
    assert len(bomb) < 2000
    with pytest.raises(UnreadableMedia, match="more than 1000 points"):
        check(bomb, "npz")


def glb(header: dict, binary: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 4)
    chunk = struct.pack("<I4s", len(binary), b"BIN\0") + binary if binary else b""
    return struct.pack("<4sIII4s", b"glTF", 2, 20 + len(text) + len(chunk), len(text), b"JSON") + text + chunk


BOX_GLB = as_bytes(trimesh.creation.box(), "glb")
(HEADER_BYTES,) = struct.unpack_from("<I", BOX_GLB, 12)
HEADER = json.loads(BOX_GLB[20 : 20 + HEADER_BYTES])


def of_glb(**changes: object) -> bytes:
    """Return a glb of a box with parts of its header replaced."""
    return glb(HEADER | changes, BOX_GLB[28 + HEADER_BYTES :])


TRIANGLE = b"v 0 0 0\nv 1 0 0\nv 0 1 0\n"
PLY = as_bytes(trimesh.creation.box(), "ply")
BROKEN_MESHES = {
    "empty obj": (b"", "obj", "no faces"),
    "obj of text": (b"a story about a chair\n" * 9, "obj", "no faces"),
    "obj without faces": (TRIANGLE, "obj", "no faces"),
    "obj of other vertices": (TRIANGLE + b"f 7 8 9\n", "obj", "."),
    "obj with NaN": (b"v nan 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", "obj", "NaN, Inf"),
    "obj beyond float32": (b"v 1e60 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", "obj", "too large"),
    "obj without area": (b"v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n", "obj", "area"),
    "empty glb": (b"", "glb", "too short"),
    "garbage glb": (b"glTF" + b"\x02\0\0\0" + b"\xff" * 90, "glb", "header"),
    "truncated glb": (BOX_GLB[:-100], "glb", "."),
    "glb without meshes": (glb({"asset": {"version": "2.0"}, "scenes": [{"nodes": []}]}), "glb", "."),
    "glb of a list": (glb([]), "glb", "header"),  # type: ignore[arg-type]
    "glb with a file": (of_glb(buffers=[{"byteLength": 9, "uri": "/etc/hostname"}]), "glb", "another file"),
    "glb with an address": (of_glb(images=[{"uri": "http://127.0.0.1/x.png"}]), "glb", "another file"),
    "glb of absurd counts": (
        of_glb(accessors=[*HEADER["accessors"], {"count": 2**40, "componentType": 5126, "type": "VEC3"}]),
        "glb",
        r"declares 10995116\d+ elements",
    ),
    "glb of one array used often": (
        of_glb(
            accessors=[HEADER["accessors"][0] | {"count": 1_000_000}],
            meshes=[{"primitives": [{"attributes": {"POSITION": 0}, "indices": 0}] * 50}],
        ),
        "glb",
        "declares 100000000 elements",
    ),
    "glb of a circle": (of_glb(nodes=[{"children": [1]}, {"children": [0], "mesh": 0}]), "glb", "tree"),
    "empty ply": (b"", "ply", "no header"),
    "ply of absurd counts": (PLY.replace(b"element vertex 8", b"element vertex 99999999999"), "ply", "declares"),
    "ply of odd counts": (PLY.replace(b"element vertex 8", b"element vertex -8"), "ply", "-8"),
    "truncated ply": (PLY[:-30], "ply", "."),
    "ply without faces": (trimesh.PointCloud(GOOD[:, :3]).export(file_type="ply"), "ply", "no normals"),
    "glb called obj": (BOX_GLB, "obj", "no faces"),
    "ply called glb": (PLY, "glb", "header"),
    "an unknown ending": (PLY, "off", "extension 'off'"),
}


@pytest.mark.parametrize("what", BROKEN_MESHES)
def test_broken_meshes_are_refused(what: str, modality: PointsModality) -> None:
    data, extension, reason = BROKEN_MESHES[what]
    begun = time.monotonic()
    for read in (check, modality.read_media):
        with pytest.raises(UnreadableMedia, match=reason) as error:
            read(data, extension)
        assert len(str(error.value)) < 500
    assert time.monotonic() - begun < 20


def test_nothing_beside_the_file_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "red.mtl").write_text("newmtl a\nKd 1 0 0\n")
    obj = b"mtllib red.mtl\nusemtl a\n" + TRIANGLE + b"f 1 2 3\n"
    (tmp_path / "x.obj").write_bytes(obj)
    monkeypatch.chdir(tmp_path)
    red = cloud_from_mesh(trimesh.load_scene(tmp_path / "x.obj"), 9, seed=0)[:, 6:]
    np.testing.assert_array_equal(red, np.broadcast_to([1, 0, 0], (9, 3)))  # trimesh would follow it
    opened = []
    monkeypatch.setattr(builtins, "open", lambda name, *rest: opened.append(name))
    monkeypatch.setattr(io, "open", lambda name, *rest: opened.append(name))
    ply = PLY.replace(b"element vertex", b"comment TextureFile red.mtl\nelement vertex")
    for data, kind in ((obj, "obj"), (ply, "ply")):
        check(data, kind)
    assert not opened


def test_a_scene_of_very_many_faces_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(points_file, "MAX_ELEMENTS", 100)
    assert check(of_glb(), "glb")
    nodes = [{"mesh": 0, "name": f"n{i}"} for i in range(9)]  # one mesh of 12 faces, placed 9 times
    with pytest.raises(UnreadableMedia, match="108 faces"):
        check(of_glb(nodes=nodes, scenes=[{"nodes": list(range(9))}], scene=0), "glb")


def test_tokens_positions_and_choices(modality: PointsModality) -> None:
    assert (modality.tokens_per_item, modality.stride, modality.vocabulary_size) == (16, 16, 64 + 9)
    media = [modality.read_media(as_bytes(solid(n)[0], "npz"), "npz") for n in range(3)]
    ids = modality.encode(media)
    assert modality.encode([]) == []
    for one in ids:
        assert one.shape == (16,) and one.dtype == np.int64
        assert all(int(i) in modality.valid_token_ids(place) for place, i in enumerate(one))
        assert modality.decode(one).shape == (64, 9)
    assert set(modality.valid_token_ids(0)).isdisjoint(modality.valid_token_ids(1))
    positions = modality.positions(16)
    np.testing.assert_array_equal(positions[0], np.arange(16))
    np.testing.assert_array_equal(positions[1], [0] * 8 + [1] * 8)  # height is halved first
    np.testing.assert_array_equal(positions[2], [0, 0, 0, 0, 1, 1, 1, 1] * 2)
    with pytest.raises(ValueError, match="cell"):
        modality.decode(ids[0][::-1])
    with pytest.raises(ValueError, match="15 ids"):
        modality.decode(ids[0][:15])
