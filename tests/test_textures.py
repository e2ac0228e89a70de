"""Colours of meshes that few files have: wrapped textures, 16 bits, morphed attributes, other names of columns.

Expected values are computed by hand from the glTF 2.0 specification (sections 3.7.2.2 and 3.8.4.4) and from the files.
"""

import io
import json
import struct

import numpy as np
import pytest
from PIL import Image

from megamm.media.point_clouds import cloud_from_mesh, wrapped
from megamm.media.points_file import read_mesh

SQUARE = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], "<f4")
WIDE_UV = np.array([[-1, 1], [2, 1], [2, 0], [-1, 0]], "<f4")
LEFT_UV = np.array([[0, 1], [0.5, 1], [0.5, 0], [0, 0]], "<f4")
RED_BLUE = np.repeat(np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8), 4, axis=1).repeat(8, axis=0)


def glb(uv, picture=None, sampler=None, colours=None, targets=()):
    """A square with texture coordinates or colours; targets: attributes that are added with weight 1."""
    body, views, accessors = b"", [], []

    def add(data):
        nonlocal body
        body += bytes(-len(body) % 4)
        views.append({"buffer": 0, "byteOffset": len(body), "byteLength": len(data)})
        body += data
        return len(views) - 1

    def accessor(values):
        kind = {2: "VEC2", 3: "VEC3"}[values.shape[1]]
        view = add(values.astype("<f4").tobytes())
        accessors.append({"bufferView": view, "componentType": 5126, "count": len(values), "type": kind})
        return len(accessors) - 1

    attributes = {"POSITION": accessor(SQUARE)}
    attributes |= {"TEXCOORD_0": accessor(uv)} if uv is not None else {}
    attributes |= {"COLOR_0": accessor(colours)} if colours is not None else {}
    accessors.append(
        {"bufferView": add(bytes([0, 1, 2, 0, 2, 3])), "componentType": 5121, "count": 6, "type": "SCALAR"}
    )
    primitive = {"attributes": attributes, "indices": len(accessors) - 1}
    primitive["targets"] = [{name: accessor(values) for name, values in target.items()} for target in targets]
    header = {"asset": {"version": "2.0"}, "scene": 0, "scenes": [{"nodes": [0]}], "nodes": [{"mesh": 0}]}
    header["meshes"] = [{"primitives": [primitive], "weights": [1.0] * len(targets)}]
    if picture is not None:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        header["images"] = [{"bufferView": add(file.getvalue()), "mimeType": "image/png"}]
        header["textures"] = [{"source": 0} | ({"sampler": 0} if sampler else {})]
        header["samplers"] = [sampler or {}]
        header["materials"] = [{"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}}}]
        primitive["material"] = 0
    header |= {"accessors": accessors, "bufferViews": views, "buffers": [{"byteLength": len(body)}]}
    text = json.dumps(header).encode()
    text, body = text + b" " * (-len(text) % 4), body + bytes(-len(body) % 4)
    chunks = struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(body), b"BIN\0") + body
    return b"glTF" + struct.pack("<II", 2, 12 + len(chunks)) + chunks


def colours_at(data, extension, low, high):
    """The distinct colours of points whose x is between low and high."""
    cloud = cloud_from_mesh(read_mesh(data, extension), 3000, 0)
    inside = (cloud[:, 0] > low) & (cloud[:, 0] < high)
    return sorted({tuple(rgb.tolist()) for rgb in cloud[inside, 6:].round(2)})


RED, BLUE = (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)


@pytest.mark.parametrize(
    "wrap, left, right",
    [(None, [RED, BLUE], [RED, BLUE]), (33071, [RED, RED], [BLUE, BLUE]), (33648, [BLUE, RED], [BLUE, RED])],
)
def test_textures_continue_as_their_sampler_says(wrap, left, right):
    """u from -1 to 2: the picture is the middle third; each list has the colours of a third's halves."""
    data = glb(WIDE_UV, RED_BLUE, {"wrapS": wrap} if wrap else None)
    for third, expected in ((0, left), (1, [RED, BLUE]), (2, right)):
        for half in (0, 1):
            low = third / 3 + half / 6
            assert colours_at(data, "glb", low + 0.01, low + 0.15) == [expected[half]]


def test_both_axes_wrap_on_their_own():
    uv = np.array([[-0.25, -0.25], [1.25, 1.25], [np.nan, np.inf]])
    np.testing.assert_allclose(wrapped(uv, "clamp mirror"), [[0, 0.25], [1, 0.75], [0, 0]])
    np.testing.assert_allclose(wrapped(uv, "any name"), [[0.75, 0.75], [0.25, 0.25], [0, 0]])
    np.testing.assert_allclose(wrapped(uv, None), wrapped(uv, "repeat repeat"))


def test_a_texture_of_16_bits_keeps_its_upper_8():
    data = glb(LEFT_UV, np.full((8, 8), 0x8000, np.uint16))
    assert colours_at(data, "glb", 0, 1) == [(0.5, 0.5, 0.5)]


def test_morph_targets_move_colours_and_texture_coordinates():
    shifted = glb(LEFT_UV, RED_BLUE, targets=[{"TEXCOORD_0": np.tile([[0.5, 0]], (4, 1))}])
    assert colours_at(shifted, "glb", 0.01, 0.99) == [BLUE]
    red = np.tile([[1.0, 0, 0]], (4, 1))
    yellow = glb(None, colours=red, targets=[{"COLOR_0": np.tile([[0.5, 1, 0]], (4, 1))}])
    assert colours_at(yellow, "glb", 0, 1) == [(1.0, 1.0, 0.0)]


@pytest.mark.parametrize(
    "kind, names, values",
    [
        ("uchar", "r g b", "255 0 0"),
        ("uchar", "Red Green Blue", "255 0 0"),
        ("int", "red green blue", "255 0 0"),
        ("uint", "red green blue", "255 0 0"),
        ("ushort", "red green blue", "65535 0 0"),
        ("double", "diffuse_red diffuse_green diffuse_blue", "1 0 0"),
    ],
)
def test_colours_of_ply_files_have_several_names_and_types(kind, names, values):
    columns = "\n".join(f"property {kind} {name}" for name in names.split())
    head = f"ply\nformat ascii 1.0\nelement vertex 3\nproperty float x\nproperty float y\nproperty float z\n{columns}\n"
    head += "element face 1\nproperty list uchar int vertex_indices\nend_header\n"
    data = (head + "".join(f"{x} {y} 0 {values}\n" for x, y in ((0, 0), (1, 0), (1, 1))) + "3 0 1 2\n").encode()
    assert colours_at(data, "ply", 0, 1) == [RED]


def test_an_obj_with_a_byte_order_mark_or_indented_lines_is_whole():
    lines = [b"v 0 0 0", b"v 1 0 0", b"v 1 1 0", b"v 0 1 0", b"f 1 2 3"]
    for data in (b"\n".join(lines), b"\xef\xbb\xbf" + b"\n".join(lines), b"\r\n".join(b"  " + line for line in lines)):
        (mesh,) = read_mesh(data, "obj").geometry.values()
        np.testing.assert_array_equal(mesh.triangles[0], [[0, 0, 0], [1, 0, 0], [1, 1, 0]])
