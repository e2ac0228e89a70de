"""Meshes as other programs write them: defaults and number formats of glTF, concave polygons, negative indices.

Expected values are computed by hand from the glTF 2.0 specification and the shapes' areas.
"""

import io
import json
import struct

import numpy as np
import pytest
import trimesh
from PIL import Image

from megamm.common.errors import UnreadableMedia
from megamm.media.point_clouds import cloud_from_mesh, mesh_instances
from megamm.media.points_file import digest_of_points, read_mesh, read_points

FLOAT, BYTE, UBYTE, SHORT, USHORT, UINT = 5126, 5120, 5121, 5122, 5123, 5125
SQUARE = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], "<f4")
INDICES = np.array([0, 1, 2, 0, 2, 3], "<u2")


class Glb:
    """Builds a glb of one node whose mesh has one primitive; parts of its header can be replaced."""

    def __init__(self):
        self.body, self.header = b"", {"asset": {"version": "2.0"}, "bufferViews": [], "accessors": []}
        self.primitive = {"attributes": {}}

    def view(self, data, **more):
        self.body += bytes(-len(self.body) % 4)
        self.header["bufferViews"].append({"buffer": 0, "byteOffset": len(self.body), "byteLength": len(data)} | more)
        self.body += data
        return len(self.header["bufferViews"]) - 1

    def add(self, values, component, kind, **more):
        view = {"bufferView": self.view(np.ascontiguousarray(values).tobytes())}
        self.header["accessors"].append(view | {"componentType": component, "count": len(values), "type": kind} | more)
        return len(self.header["accessors"]) - 1

    def surface(self, position=SQUARE, component=FLOAT, indices=INDICES, **more):
        self.primitive["attributes"]["POSITION"] = self.add(position, component, "VEC3", **more)
        if indices is not None:
            self.primitive["indices"] = self.add(indices, USHORT, "SCALAR")
        return self

    def texture(self, *pixels, uv=((0.25, 0.5),) * 4, component=FLOAT, **more):
        """A picture of these colours in one row, all points at uv."""
        file = io.BytesIO()
        Image.fromarray(np.uint8([pixels])).save(file, format="PNG")
        self.header["images"] = [{"bufferView": self.view(file.getvalue()), "mimeType": "image/png"}]
        self.header["textures"] = [{"source": 0}]
        self.primitive["attributes"]["TEXCOORD_0"] = self.add(np.asarray(uv), component, "VEC2", **more)
        return self.material(baseColorTexture={"index": 0})

    def material(self, **pbr):
        self.header["materials"] = [{"pbrMetallicRoughness": pbr}]
        self.primitive["material"] = 0
        return self

    def bytes(self, **changes):
        header = {"meshes": [{"primitives": [self.primitive]}], "nodes": [{"mesh": 0}]} | self.header
        header |= {"scenes": [{"nodes": [0]}], "scene": 0, "buffers": [{"byteLength": len(self.body)}]} | changes
        text = json.dumps({key: value for key, value in header.items() if value is not None}).encode()
        text += b" " * (-len(text) % 4)
        body = self.body + bytes(-len(self.body) % 4)
        chunks = struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(body), b"BIN\0") + body
        return b"glTF" + struct.pack("<II", 2, 12 + len(chunks)) + chunks


def surface(data, kind="glb"):
    """The corners `[F, 3, 3]` of all faces in the scene."""
    return np.concatenate([part.corners for part in mesh_instances(read_mesh(data, kind))])


def area(corners):
    return np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1).sum() / 2


def box(corners):
    return corners.reshape(-1, 3).min(0).tolist(), corners.reshape(-1, 3).max(0).tolist()


def colour(data, kind="glb"):
    """The single colour of a mesh, as float RGB."""
    cloud = read_points(data, kind, 64)[0]
    assert np.ptp(cloud[:, 6:], axis=0).max() == 0
    return cloud[0, 6:].tolist()


RED, WHITE = (255, 0, 0), (255, 255, 255)
COLOURS = {
    "a texture without a factor": (lambda: Glb().surface().texture(RED, RED), [1, 0, 0]),
    "no material": (lambda: Glb().surface(), [1, 1, 1]),
    "an empty material": (lambda: Glb().surface().material(), [1, 1, 1]),
    "a factor": (lambda: Glb().surface().material(baseColorFactor=[0.2, 0.4, 0.6, 1]), [0.2, 0.4, 0.6]),
}


@pytest.mark.parametrize("what", COLOURS)
def test_colours_that_a_gltf_does_not_name_are_its_defaults(what):
    make, expected = COLOURS[what]
    np.testing.assert_allclose(colour(make().bytes()), expected, atol=1e-6)


def test_a_default_material_and_colours_of_vertices_multiply():
    """Section 3.9.2: the base colour is factor x texture x COLOR_0, each 1 where it is missing."""
    for component, scale, dtype in ((FLOAT, 1, "<f4"), (UBYTE, 255, "u1"), (USHORT, 65535, "<u2")):
        glb = Glb().surface()
        values = np.round(np.full((4, 4), 0.4) * scale, 6).astype(dtype)
        glb.primitive["attributes"]["COLOR_0"] = glb.add(values, component, "VEC4", normalized=component != FLOAT)
        np.testing.assert_allclose(colour(glb.bytes()), 0.4, atol=1 / 255)
        glb.material(baseColorFactor=[1, 0.6, 0, 1])
        np.testing.assert_allclose(colour(glb.bytes()), [0.4, 0.24, 0], atol=1 / 255)


@pytest.mark.parametrize(("component", "dtype", "low", "high"), [
    (BYTE, "i1", -127, 127), (UBYTE, "u1", 0, 255), (SHORT, "<i2", -32767, 32767), (USHORT, "<u2", 0, 65535),
])  # fmt: skip
def test_normalised_integers_are_scaled(component, dtype, low, high):
    """Section 3.11: the largest value is 1, and for signed ones the two lowest are -1."""
    corners = np.array([[low, low, 0], [high, low, 0], [high, high, 0], [low, high, 0]], dtype)
    padded = np.zeros((4, 4), dtype)
    padded[:, :3] = corners
    glb = Glb()
    view = glb.view(padded.tobytes(), byteStride=padded.strides[0])
    accessor = {"bufferView": view, "componentType": component, "count": 4, "type": "VEC3", "normalized": True}
    glb.header["accessors"].append(accessor)
    glb.primitive |= {"attributes": {"POSITION": 0}, "indices": glb.add(INDICES, USHORT, "SCALAR")}
    least = -1.0 if low else 0.0
    assert box(surface(glb.bytes())) == ([least, least, 0], [1, 1, 0])
    if low:
        padded[:, 0][padded[:, 0] == low] = low - 1
        glb.body = padded.tobytes() + glb.body[padded.nbytes :]
        assert box(surface(glb.bytes()))[0][0] == -1
    accessor.pop("normalized")  # KHR_mesh_quantization: integers as they are
    assert box(surface(glb.bytes(extensionsRequired=["KHR_mesh_quantization"])))[1] == [high, high, 0]


def test_normalised_texture_coordinates_are_scaled():
    """The left quarter and the rest have different colours; 0.5 is 32768 of 65535."""
    uv = np.full((4, 2), 32768, "<u2")
    glb = Glb().surface().texture((0, 0, 255), RED, RED, RED, uv=uv, component=USHORT, normalized=True)
    np.testing.assert_allclose(colour(glb.bytes()), [1, 0, 0])


def test_texture_coordinates_of_the_named_set_and_their_transform_are_used():
    glb = Glb().surface().texture((0, 0, 255), RED, uv=np.full((4, 2), 0.25, "<f4"))
    np.testing.assert_allclose(colour(glb.bytes()), [0, 0, 1])
    glb.primitive["attributes"]["TEXCOORD_1"] = glb.add(np.full((4, 2), 0.75, "<f4"), FLOAT, "VEC2")
    np.testing.assert_allclose(colour(glb.material(baseColorTexture={"index": 0, "texCoord": 1}).bytes()), [1, 0, 0])
    for transform in ({"offset": [0.5, 0]}, {"scale": [3, 1]}, {"texCoord": 1}, {"rotation": np.pi, "offset": [1, 0]}):
        texture = {"index": 0, "extensions": {"KHR_texture_transform": transform}}
        np.testing.assert_allclose(colour(glb.material(baseColorTexture=texture).bytes()), [1, 0, 0])


def sparse(glb, count, base, rows, values):
    where = glb.view(np.array(rows, "<u2").tobytes())
    accessor = {"componentType": FLOAT, "count": count, "type": "VEC3"} | base
    accessor["sparse"] = {
        "count": len(rows),
        "indices": {"bufferView": where, "componentType": USHORT},
        "values": {"bufferView": glb.view(np.asarray(values, "<f4").tobytes())},
    }
    glb.header["accessors"].append(accessor)
    return len(glb.header["accessors"]) - 1


def test_sparse_values_replace_those_of_the_buffer_or_zeros():
    glb = Glb()
    base = {"bufferView": glb.view(SQUARE.tobytes())}
    glb.primitive = {"attributes": {"POSITION": sparse(glb, 4, base, [1, 2], [[5, 0, 0], [5, 1, 0]])}}
    glb.primitive["indices"] = glb.add(INDICES, USHORT, "SCALAR")
    assert area(surface(glb.bytes())) == 5
    glb.primitive["attributes"]["POSITION"] = sparse(glb, 4, {}, [1, 2, 3], SQUARE[1:])
    assert area(surface(glb.bytes())) == 1
    glb.primitive["attributes"]["POSITION"] = sparse(glb, 4, {}, [4], SQUARE[1:2])
    with pytest.raises(UnreadableMedia, match="changes number 4"):
        digest_of_points(glb.bytes(), "glb")
    glb.primitive["attributes"]["POSITION"] = sparse(glb, 20_000_000, {}, [1, 2, 3], SQUARE[1:])
    with pytest.raises(UnreadableMedia, match="without data"):
        digest_of_points(glb.bytes(), "glb")


@pytest.mark.parametrize(("mode", "order"), [(4, [0, 1, 2, 0, 2, 3]), (5, [0, 1, 3, 2]), (6, [0, 1, 2, 3])])
def test_triangles_strips_and_fans_face_the_same_way(mode, order):
    glb = Glb().surface(indices=np.array(order, "<u2"))
    glb.primitive["mode"] = mode
    assert area(surface(glb.bytes())) == 1
    assert read_points(glb.bytes(), "glb", 50)[0][:, 3:6].tolist() == [[0, 0, 1]] * 50
    no_indices = Glb().surface(SQUARE[order], indices=None)
    no_indices.primitive["mode"] = mode
    assert area(surface(no_indices.bytes())) == 1


def test_a_mirrored_node_still_faces_outward():
    """Section 3.7.4: a negative determinant reverses the order of the corners."""
    glb = Glb().surface()
    glb.header["nodes"] = [{"mesh": 0, "scale": [-1, 1, 1]}]
    assert read_points(glb.bytes(), "glb", 20)[0][:, 3:6].tolist() == [[0, 0, 1]] * 20


def test_morph_targets_have_their_default_weights():
    glb = Glb().surface()
    glb.primitive["targets"] = [
        {"POSITION": glb.add(np.float32([[0, 0, 0], [4, 0, 0], [4, 0, 0], [0] * 3]), FLOAT, "VEC3")}
    ]
    for weights, width in (({}, 1), ({"weights": [0.5]}, 3)):
        assert area(surface(glb.bytes(meshes=[{"primitives": [glb.primitive]} | weights]))) == width
    meshes = [{"primitives": [glb.primitive], "weights": [0.5]}]
    assert area(surface(glb.bytes(meshes=meshes, nodes=[{"mesh": 0, "weights": [1.0]}]))) == 5


def test_a_skin_places_its_mesh():
    """Two joints, 10 above and 20 below; the transform of the mesh's own node does not count (section 3.7.3)."""
    glb = Glb().surface()
    glb.primitive["attributes"] |= {
        "JOINTS_0": glb.add(np.uint8([[0, 0, 0, 0]] * 2 + [[1, 0, 0, 0]] * 2), UBYTE, "VEC4"),
        "WEIGHTS_0": glb.add(np.uint8([[255, 0, 0, 0]] * 4), UBYTE, "VEC4", normalized=True),
    }
    inverse = np.stack([np.eye(4), np.eye(4)]).astype("<f4")
    inverse[:, 3, 0] = 0.5  # columns: a shift along x
    glb.header["skins"] = [{"joints": [1, 2], "inverseBindMatrices": glb.add(inverse.reshape(2, 16), FLOAT, "MAT4")}]
    nodes = [{"mesh": 0, "skin": 0, "scale": [7, 7, 7]}, {"translation": [0, -20, 0]}, {"translation": [0, 10, 0]}]
    data = glb.bytes(nodes=nodes, scenes=[{"nodes": [0, 1, 2]}])
    assert box(surface(data)) == ([0.5, -20, 0], [1.5, 11, 0])


def draco(glb, required):
    """Add a second mesh whose data are only in an extension."""
    empty = [
        {"componentType": FLOAT, "count": 4, "type": "VEC3"},
        {"componentType": USHORT, "count": 6, "type": "SCALAR"},
    ]
    first = len(glb.header["accessors"])
    glb.header["accessors"] += empty
    extension = {"KHR_draco_mesh_compression": {"bufferView": glb.view(b"DRACO"), "attributes": {"POSITION": 0}}}
    primitive = {"attributes": {"POSITION": first}, "indices": first + 1, "extensions": extension}
    names = ["KHR_draco_mesh_compression"]
    return glb.bytes(
        meshes=[{"primitives": [glb.primitive]}, {"primitives": [primitive]}],
        nodes=[{"mesh": 0}, {"mesh": 1}],
        scenes=[{"nodes": [0, 1]}],
        extensionsUsed=names,
        extensionsRequired=names if required else None,
    )


def meshopt():
    glb = Glb().surface()
    data = glb.header["bufferViews"][0] | {"buffer": 1, "extensions": {"EXT_meshopt_compression": {"buffer": 0}}}
    return glb.bytes(
        bufferViews=[data, *glb.header["bufferViews"][1:]], buffers=[{"byteLength": 60}, {"byteLength": 48}]
    )


def ktx():
    glb = Glb().surface().texture(RED, RED)
    return glb.bytes(textures=[{"extensions": {"KHR_texture_basisu": {"source": 0}}}])


def instances():
    extension = {"EXT_mesh_gpu_instancing": {"attributes": {}}}
    return Glb().surface().bytes(nodes=[{"mesh": 0, "extensions": extension}])


REFUSED = {
    "draco beside a plain mesh": (lambda: draco(Glb().surface(), True), "KHR_draco_mesh_compression"),
    "draco that is not required": (lambda: draco(Glb().surface(), False), "KHR_draco_mesh_compression"),
    "meshopt": (meshopt, "EXT_meshopt_compression"),
    "required and unknown": (lambda: Glb().surface().bytes(extensionsRequired=["ABC_x"]), "ABC_x, which is not"),
    "a texture in KTX2 only": (ktx, "KHR_texture_basisu"),
    "instances": (instances, "EXT_mesh_gpu_instancing"),
    "a broken texture": (lambda: Glb().surface().texture(RED, RED).bytes(images=[{"bufferView": 0}]), "a texture"),
    "vertices that do not exist": (lambda: Glb().surface(indices=np.array([0, 1, 9], "<u2")).bytes(), "vertex 9 of 4"),
    "half a triangle": (lambda: Glb().surface(indices=INDICES[:5]).bytes(), "not triangles"),
    "a body that is too short": (lambda: Glb().surface().bytes(accessors=[
        {"bufferView": 0, "componentType": FLOAT, "count": 5, "type": "VEC3"},
        {"bufferView": 1, "componentType": USHORT, "count": 6, "type": "SCALAR"}]), "truncated"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_gltf_has_and_cannot_be_read_is_named(what):
    make, reason = REFUSED[what]
    for read in (lambda data: digest_of_points(data, "glb"), lambda data: read_points(data, "glb", 9)):
        with pytest.raises(UnreadableMedia, match=reason):
            read(make())


def test_what_only_decorates_may_be_required():
    names = ["KHR_materials_unlit", "KHR_texture_transform", "KHR_mesh_quantization", "KHR_lights_punctual"]
    assert digest_of_points(Glb().surface().bytes(extensionsRequired=names), "glb")


def test_a_plain_gltf_is_read_as_trimesh_reads_it():
    scene = trimesh.Scene()
    for number, mesh in enumerate((trimesh.creation.box((1, 2, 3)), trimesh.creation.icosphere())):
        mesh.visual.vertex_colors = np.tile(np.uint8([200, 10 * number, 30, 255]), (len(mesh.vertices), 1))
        turn = trimesh.transformations.rotation_matrix(0.5 + number, [1, 2, 3], [4, 5, 6])
        scene.add_geometry(mesh, transform=turn)
        scene.add_geometry(mesh, transform=turn @ np.diag([2, 3, 4, 1]))
    data = scene.export(file_type="glb")
    expected = trimesh.load_scene(io.BytesIO(data), file_type="glb", process=False)
    np.testing.assert_allclose(surface(data), np.concatenate([p.corners for p in mesh_instances(expected)]), atol=1e-5)
    np.testing.assert_allclose(
        cloud_from_mesh(read_mesh(data, "glb"), 99, 0), cloud_from_mesh(expected, 99, 0), atol=2e-3
    )


# Outlines in the plane, and their areas. The hole is joined to the outline by an edge that is passed twice.
OUTLINES = {
    "a dart": ([(0, 0), (2, 0), (2, 2), (1, 0.5), (0, 2)], 2.5),
    "a dart from its hollow": ([(1, 0.5), (0, 2), (0, 0), (2, 0), (2, 2)], 2.5),
    "a concave square": ([(0, 0), (4, 0), (1, 1), (0, 4)], 4.0),
    "a hole with a bridge": (
        [(0, 0), (4, 0), (4, 4), (0, 4), (0, 0), (1, 1), (1, 3), (3, 3), (3, 1), (1, 1)],
        12.0,
    ),
    "repeated corners": ([(0, 0), (0, 0), (2, 0), (2, 2), (2, 2), (1, 0.5), (0, 2)], 2.5),
    "a spike without an area": ([(0, 0), (2, 0), (3, 1), (2, 0), (0, 2)], 2.0),
    "corners on an edge": ([(0, 0), (1, 0), (2, 0), (2, 2), (1, 0.5), (0, 2), (0, 1)], 2.5),
    "a comb": ([(0, 0), (7, 0), (7, 3), (6, 1), (5, 3), (4, 1), (3, 3), (2, 1), (1, 3), (0, 1)], 14.0),
}


def obj(outline, face="f {}"):
    """An obj file of an outline in a tilted plane, where one unit of both axes is one unit long."""
    right, up = np.array([0.6, 0.8, 0]), np.array([0, 0, 1.0])
    lines = ["v {} {} {}".format(*(x * right + y * up)) for x, y in outline]
    numbers = range(1, len(outline) + 1)
    return "\n".join([*lines, face.format(" ".join(map(str, numbers)))]).encode() + b"\n"


def ply(outline, binary):
    vertices = b"".join(struct.pack("<3f", 0.6 * x, 0.8 * x, y) for x, y in outline)
    face = struct.pack(f"<B{len(outline)}i", len(outline), *range(len(outline)))
    triangle = struct.pack("<B3i", 3, 0, 1, 1)
    if not binary:
        vertices = b"".join(f"{0.6 * x} {0.8 * x} {y}\n".encode() for x, y in outline)
        face = " ".join(map(str, [len(outline), *range(len(outline))])).encode() + b"\n"
        triangle = b"3 0 1 1\n"
    head = f"ply\nformat {'binary_little_endian' if binary else 'ascii'} 1.0\nelement vertex {len(outline)}\n"
    head += "property float x\nproperty float y\nproperty float z\nelement face 2\n"
    return head.encode() + b"property list uchar int vertex_indices\nend_header\n" + vertices + face + triangle


@pytest.mark.parametrize("what", OUTLINES)
def test_polygons_are_covered_exactly(what):
    outline, expected = OUTLINES[what]
    files = {"obj": [obj(outline)], "ply": [ply(outline, binary) for binary in (False, True)]}
    for kind, data in [(kind, data) for kind, several in files.items() for data in several]:
        corners = surface(data, kind)
        assert area(corners) == pytest.approx(expected, rel=1e-6)
        normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        assert (normals @ [0.8, -0.6, 0] >= -1e-6).all()  # all on the side of the outline's


def test_an_outline_that_crosses_itself_and_data_that_a_ply_does_not_declare_are_refused():
    crossed = [(0, 0), (2, 2), (1, 0.5), (0, 2)]
    for data, kind in ((obj(crossed), "obj"), (ply(crossed, True), "ply")):
        with pytest.raises(UnreadableMedia, match="4 corners crosses itself"):
            digest_of_points(data, kind)
    for binary in (False, True):
        data = ply(OUTLINES["a dart"][0], binary)
        assert digest_of_points(data + b"\n", "ply")
        with pytest.raises(UnreadableMedia, match="after its last element"):
            digest_of_points(data.replace(b"element face 2", b"element face 1"), "ply")


def test_no_point_of_a_concave_polygon_is_outside():
    """The dart's notch: above y = 0.5 + 1.5 |x - 1| there is nothing."""
    cloud = cloud_from_mesh(read_mesh(obj(OUTLINES["a dart"][0]), "obj"), 2000, seed=0)
    x, y = cloud[:, :3] @ [0.6, 0.8, 0], cloud[:, 2]
    assert (y <= 0.5 + 1.5 * np.abs(x - 1) + 1e-6).all()


def test_convex_polygons_and_triangles_are_split_as_trimesh_splits_them():
    mesh = trimesh.creation.icosphere()
    data = mesh.export(file_type="obj").encode()
    expected = trimesh.load_scene(io.BytesIO(data), file_type="obj", process=False)
    np.testing.assert_array_equal(surface(data, "obj"), mesh_instances(expected)[0].corners)
    quad = b"v 0 0 0\nv 2 0 0\nv 2 2 0\nv 0 2 0\nf 1 2 3 4\n"
    expected = trimesh.load_scene(io.BytesIO(quad), file_type="obj", process=False)
    triangles = [
        np.sort(c.reshape(len(c), 9), axis=1) for c in (surface(quad, "obj"), mesh_instances(expected)[0].corners)
    ]
    np.testing.assert_array_equal(*triangles)


def test_negative_corners_count_from_their_own_line():
    first, second = b"v 0 0 0\nv 1 0 0\nv 0 1 0\n", b"v 0 0 5\nv 3 0 5\nv 0 3 5\n"
    data = first + b"f -3 -2 -1\n" + second + b"f -3/-1 -2/-1 \\\n -1/-1 # the last three\n"
    assert area(surface(data, "obj")) == 0.5 + 4.5
    assert surface(data, "obj")[0].tolist() == [[0, 0, 0], [1, 0, 0], [0, 1, 0]]
    for ends in (first + b"f -3 -2 \r-1\n", (first + b"f 1 2 3\n").replace(b"\n", b"\r")):
        assert area(surface(ends, "obj")) == 0.5
    for wrong, reason in ((b"f -4 -2 -1\n", "vertex -4"), (b"f 0 1 2\n", "vertex 0"), (b"f 1 2 9\n", "vertex 9 of 3")):
        with pytest.raises(UnreadableMedia, match=reason):
            digest_of_points(first + wrong, "obj")
    with pytest.raises(UnreadableMedia, match="free-form"):
        digest_of_points(first + b"f 1 2 3\nsurf 0 1 0 1 1 2 3 4\n", "obj")


def test_a_damaged_line_of_an_obj_leaves_no_hole():
    """Other readers ignore lines with an unknown keyword; "fo" is the earlier keyword of faces."""
    corners = b"v 0 0 0\nv 1 0 0\nv 0 1 0\nvn 0 0 1\nvt 0 0\nvp 0 0\ns 1\nexporter's own line\n"
    assert area(surface(corners + b"fo 1 2 3\nf 1 3 2\n", "obj")) == 1.0
    for damaged in (b"f0 1 2 3\n", b"v1 1 1 1\n"):
        with pytest.raises(UnreadableMedia, match="not a keyword of obj"):
            digest_of_points(corners + b"f 1 2 3\n" + damaged, "obj")


def test_a_row_of_a_text_ply_is_its_line():
    """A wrong length of a list must not take the next row's values: found by fuzz_media.py."""
    head = b"ply\nformat ascii 1.0\nelement vertex 5\nproperty float x\nproperty float y\nproperty float z\n"
    head += b"element face 2\nproperty list uchar int vertex_indices\nend_header\n"
    head += b"0 0 0\n2 0 0\n2 2 0\n1 .5 0\n0 2 0\n"
    assert area(surface(head + b"3 2 3 4\n\n3 0 1 2 \r\n", "ply")) == 1.5 + 2.0
    for damaged in (b"5 2 3 4\n3 0 1 2\n", b"3 2 3 4 0\n3 0 1 2\n", b"3 2 3 4\n"):
        with pytest.raises(UnreadableMedia, match=r"truncated|a row of 4 values has 5"):
            digest_of_points(head + damaged, "ply")


def test_colours_of_vertices_survive_texture_coordinates_and_have_any_width():
    coloured = b"v 0 0 0 1 0 0\nv 1 0 0 1 0 0\nv 0 1 0 1 0 0\nvt 0 0\nf 1/1 2/1 3/1\n"
    assert colour(coloured, "obj") == [1, 0, 0]
    assert colour(coloured.replace(b" 1 0 0\n", b" 255 0 0\n"), "obj") == [1, 0, 0]
    head = b"ply\nformat ascii 1.0\nelement vertex 3\nproperty float x\nproperty float y\nproperty float z\n"
    tail = b"element face 1\nproperty list uchar int vertex_index\nend_header\n"
    for kind, value in ((b"uchar", b"51"), (b"ushort", b"13107"), (b"float", b"0.2")):
        names = b"".join(b"property %s %s\n" % (kind, name) for name in (b"red", b"green", b"blue"))
        uv = b"property float s\nproperty float t\n"
        rows = b"".join(b"%s %s 0 0 0.5 0.5\n" % (xyz, value) for xyz in (b"0 0 0", b"1 0 0", b"0 1 0"))
        np.testing.assert_allclose(
            colour(head + names + uv + tail + rows + b"3 0 1 2\n", "ply"), [0.2, 0, 0], atol=1e-6
        )


@pytest.mark.parametrize("order", ["little", "big"])
def test_a_binary_ply_mixes_polygons_of_any_length_and_other_lists(order):
    """As Blender and MeshLab write them: triangles, squares and more, a list of other values first, and CR LF."""
    sign = {"little": "<", "big": ">"}[order]
    head = f"ply\r\nformat binary_{order}_endian 1.0\r\nelement vertex 5\r\nproperty double x\r\nproperty double y\r\n"
    head += "property double z\r\nelement face 3\r\nproperty list uchar float texcoord\r\n"
    head += "property list uint ushort vertex_index\r\n"
    head += "".join(f"property uchar {name}\r\n" for name in ("red", "green", "blue"))
    body = b"".join(struct.pack(f"{sign}3d", x, y, 0) for x, y in OUTLINES["a dart"][0])
    for corners in ((0, 1, 2), (0, 1, 3, 4), (0, 1, 2, 3, 4)):
        body += struct.pack(f"{sign}B{2 * len(corners)}f", 2 * len(corners), *range(2 * len(corners)))
        body += struct.pack(f"{sign}I{len(corners)}H3B", len(corners), *corners, 255, 0, 0)
    data = head.encode() + b"end_header\r\n" + body
    assert area(surface(data, "ply")) == pytest.approx(2 + 1.5 + 2.5)  # (0,0)-(2,0)-(1,.5)-(0,2): 0.5 + 1
    assert colour(data, "ply") == [1, 0, 0]
    with pytest.raises(UnreadableMedia, match="truncated"):
        digest_of_points(data[:-2], "ply")


def test_colours_of_a_polygon_are_those_of_its_triangles():
    head = b"ply\nformat ascii 1.0\nelement vertex 5\nproperty float x\nproperty float y\nproperty float z\n"
    head += b"element face 2\n"
    head += b"property list uchar int vertex_indices\nproperty uchar red\nproperty uchar green\nproperty uchar blue\n"
    rows = b"0 0 0\n2 0 0\n2 2 0\n1 .5 0\n0 2 0\n5 0 1 2 3 4 255 0 0\n3 0 1 2 0 0 255\n"
    mesh = next(iter(read_mesh(head + b"end_header\n" + rows, "ply").geometry.values()))
    assert mesh.visual.face_colors[:, :3].tolist() == [[255, 0, 0]] * (len(mesh.faces) - 1) + [[0, 0, 255]]
