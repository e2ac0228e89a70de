"""glTF 2.0 (glb) as its specification reads it -> the plain subset that trimesh reads without loss.

`plain_glb` decodes every accessor that a surface needs (normalised integers, sparse values, strides), applies the
specification's defaults (white base colour, mode, weights of morph targets), skins and transforms of texture
coordinates, and writes a glb of dense float32 triangles. What cannot be decoded is refused by name: a mesh is whole or
not there. Section numbers are those of the glTF 2.0.1 specification. Points and lines have no surface and are dropped.
"""

import base64
import io
import json
import math
import struct
from collections.abc import Sequence
from typing import Any, Never

import numpy as np
import numpy.typing as npt
from PIL import Image

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float64]
Json = dict[str, Any]

_GLB = struct.Struct("<4sIIII")
_JSON, _BIN = 0x4E4F534A, 0x004E4942
_TYPES = {5120: "<i1", 5121: "<u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
_COMPONENTS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT4": 16}
_TRIANGLES, _STRIP, _FAN = 4, 5, 6
SUPPORTED = frozenset(
    {"KHR_mesh_quantization", "KHR_texture_transform", "EXT_texture_webp", "KHR_lights_punctual", "KHR_xmp_json_ld"}
)
"""Required extensions that are read, or that change no surface. So are all KHR_materials_*: they leave base colours."""
_PLACEMENT = frozenset({"EXT_mesh_gpu_instancing", "KHR_node_visibility"})
"""Extensions of nodes that add or hide parts, and are not supported even if the file does not require them."""
_REPEAT = 10497
_WRAPPINGS = {33071: "clamp", 33648: "mirror", _REPEAT: "repeat"}
_MAX_GENERATED = 8 * 2**20
"""Maximum elements of sparse accessors, whose values are not all in the file."""
_MAX_BODY = 2**29
"""Maximum bytes of the plain file: a small one can have many nodes with other weights of one large mesh."""
_TEXTURES = ("PNG", "JPEG", "WEBP")
_BLOCK = 65536
"""Vertices that are skinned together: each takes a matrix."""


def plain_glb(data: bytes) -> bytes:
    """A glb with the same surface and base colours, for trimesh. Raises ValueError if a part cannot be read."""
    try:
        # Coordinates too large for float32 become Inf, which the caller refuses.
        with np.errstate(all="ignore"):
            return _Plain(*_chunks(data)).glb()
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError, struct.error) as error:
        raise ValueError(f"not a glb file: broken header: {type(error).__name__}: {error}") from error


def _chunks(data: bytes) -> tuple[Json, bytes]:
    """The header and the binary chunk (section 4.4); empty if there is none. The caller has checked the first one."""
    length = _GLB.unpack_from(data)[3]
    header = json.loads(data[_GLB.size : _GLB.size + length])
    start = _GLB.size + length
    while start + 8 <= len(data):
        size, kind = struct.unpack_from("<II", data, start)
        if start + 8 + size > len(data):
            raise ValueError(f"truncated: a chunk of {size} bytes has {len(data) - start - 8}")
        if kind == _BIN:
            return header, data[start + 8 : start + 8 + size]
        start += 8 + size  # other kinds of chunks are ignored
    return header, b""


def _refuse(what: str) -> Never:
    raise ValueError(f"uses the glTF extension {what}, which is not supported; export the file without it")


class _Plain:
    """Builds the plain file; `header` and `binary` are those of the given one."""

    def __init__(self, header: Json, binary: bytes) -> None:
        self.given, self.binary = header, binary
        for name in header.get("extensionsRequired", []):
            if name not in SUPPORTED and not name.startswith("KHR_materials_"):
                _refuse(name)
        self.nodes: list[Json] = [dict(node) for node in header.get("nodes", [])]
        for node in self.nodes:
            for name in _PLACEMENT.intersection(node.get("extensions", {})):
                _refuse(name)
        self.decoded: dict[int, Array] = {}
        self.buffers: dict[int, bytes] = {}
        self.generated = 0
        self.body = bytearray()
        self.views: list[Json] = []
        self.accessors: list[Json] = []
        self.images: list[Json] = []
        self.image_numbers: dict[int, int] = {}

    def glb(self) -> bytes:
        """The plain file's bytes."""
        given = self.given
        self.materials = [self._material(material) for material in given.get("materials", [])]
        # The material of primitives that name none (section 3.9): white.
        self.materials.append({"pbrMetallicRoughness": {"baseColorFactor": [1.0, 1.0, 1.0, 1.0]}})
        meshes = [self._mesh(mesh, mesh.get("weights", [])) for mesh in given.get("meshes", [])]
        roots = self._arrange(meshes)
        header: Json = {"asset": {"version": "2.0"}, "nodes": self.nodes, "meshes": meshes, "materials": self.materials}
        header |= {"accessors": self.accessors, "bufferViews": self.views, "images": self.images}
        header["textures"] = [{"source": number} for number in range(len(self.images))]
        header |= {"scene": 0, "scenes": [{"nodes": roots}], "buffers": [{"byteLength": len(self.body)}]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 4)
        self.body += bytes(-len(self.body) % 4)
        chunks = struct.pack("<II", len(text), _JSON) + text + struct.pack("<II", len(self.body), _BIN) + self.body
        return b"glTF" + struct.pack("<II", 2, 12 + len(chunks)) + chunks

    def _arrange(self, meshes: list[Json]) -> list[int]:
        """Move morphed and skinned meshes, which nodes change; returns the scene's roots."""
        scenes = self.given.get("scenes", [])
        if scenes:
            roots = list(scenes[self.given.get("scene", 0)].get("nodes", []))
        else:  # without scenes, every tree is shown
            children = {child for node in self.nodes for child in node.get("children", [])}
            roots = [number for number in range(len(self.nodes)) if number not in children]
        world = self._world(roots)
        for number in sorted(world):
            node = self.nodes[number]
            weights, skin = node.pop("weights", None), node.pop("skin", None)
            if "mesh" not in node or (weights is None and skin is None):
                continue
            mesh = self.given["meshes"][node["mesh"]]
            weights = mesh.get("weights", []) if weights is None else weights
            meshes.append(self._mesh(mesh, weights, None if skin is None else self._joints(skin, world)))
            if skin is None:
                node["mesh"] = len(meshes) - 1
            else:
                # A skin places its mesh in the scene; the transform of the mesh's own node is ignored (section 3.7.3).
                del node["mesh"]
                roots.append(len(self.nodes))
                self.nodes.append({"mesh": len(meshes) - 1})
        return roots

    def _world(self, roots: Sequence[int]) -> dict[int, FloatArray]:
        """The matrix `[4, 4]` of every node of the scene, by its number."""
        world: dict[int, FloatArray] = {}
        waiting = [(root, np.eye(4)) for root in roots]
        while waiting:
            number, parent = waiting.pop()
            if number in world or number < 0:
                raise ValueError("its nodes do not form a tree")
            world[number] = parent @ _matrix(self.nodes[number])
            waiting += [(child, world[number]) for child in self.nodes[number].get("children", [])]
        return world

    def _joints(self, skin: int, world: dict[int, FloatArray]) -> FloatArray:
        """Matrices `[J, 4, 4]` from the mesh's space to the scene's, one for each joint."""
        given = self.given["skins"][skin]
        joints = np.stack([world[joint] for joint in given["joints"]])
        if "inverseBindMatrices" not in given:
            return joints
        # Matrices are stored by columns.
        inverse = self._values(given["inverseBindMatrices"]).astype(np.float64).reshape(-1, 4, 4).swapaxes(1, 2)
        return joints @ inverse[: len(joints)]

    def _mesh(self, mesh: Json, weights: Sequence[float], joints: FloatArray | None = None) -> Json:
        """A mesh of dense triangles, morphed and, with `joints`, skinned into the scene's space."""
        primitives = [self._primitive(primitive, weights, joints) for primitive in mesh["primitives"]]
        return {"name": str(mesh.get("name", "GLTF")), "primitives": [p for p in primitives if p is not None]}

    def _primitive(self, primitive: Json, weights: Sequence[float], joints: FloatArray | None) -> Json | None:
        mode, attributes = primitive.get("mode", _TRIANGLES), primitive["attributes"]
        if mode not in (_TRIANGLES, _STRIP, _FAN):
            return None
        extensions = sorted(primitive.get("extensions", {}))
        position = self._morphed(primitive, "POSITION", weights)
        if joints is not None:
            position = self._skinned(attributes, position, joints)
        plain: Json = {"attributes": {"POSITION": self._add(position.astype("<f4"), "VEC3")}}
        if "indices" in primitive:
            indices = self._values(primitive["indices"], extensions).ravel().astype(np.int64)
            if len(indices) and indices.max() >= len(position):
                raise ValueError(f"a face refers to vertex {indices.max()} of {len(position)}")
        else:
            indices = np.arange(len(position))
        plain["indices"] = self._add(_triangles(indices, mode).astype("<u4")[:, None], "SCALAR")
        # The last material is the default one, which `__init__` has appended.
        material = primitive.get("material", len(self.materials) - 1)
        if not 0 <= material < len(self.materials):
            raise ValueError(f"material {material} of {len(self.materials) - 1}")
        plain["material"] = material
        if (name := self._texture_coordinates(material)) in attributes:
            uv = self._morphed(primitive, name, weights) @ self._texture_transform(material)[:2]
            uv += self._texture_transform(material)[2]
            plain["attributes"]["TEXCOORD_0"] = self._add(uv.astype("<f4"), "VEC2")
        elif "baseColorTexture" in self.materials[material]["pbrMetallicRoughness"]:
            raise ValueError(f"a texture without the texture coordinates {name}")
        if "COLOR_0" in attributes:
            colours = self._morphed(primitive, "COLOR_0", weights)[:, :3].clip(0, 1)
            plain["attributes"]["COLOR_0"] = self._add(colours.astype("<f4"), "VEC3")
        if any(self.accessors[a]["count"] != len(position) for a in plain["attributes"].values()):
            raise ValueError("attributes of one mesh have different lengths")
        return plain

    def _morphed(self, primitive: Json, name: str, weights: Sequence[float]) -> FloatArray:
        """An attribute with the weighted differences of the morph targets added (section 3.7.2.2)."""
        values = self._values(primitive["attributes"][name], sorted(primitive.get("extensions", {}))).astype(np.float64)
        for target, weight in zip(primitive.get("targets", []), weights, strict=False):
            if weight and name in target:
                change = weight * self._values(target[name])
                # A colour's difference may have no alpha.
                values[:, : change.shape[1]] += change
        return values

    def _skinned(self, attributes: Json, position: FloatArray, joints: FloatArray) -> FloatArray:
        """Positions `[V, 3]` moved by the weighted matrices of their joints (section 3.7.3.3)."""
        sets = [number for number in range(len(attributes)) if f"JOINTS_{number}" in attributes]
        joint = np.concatenate([self._values(attributes[f"JOINTS_{n}"]) for n in sets], 1).astype(np.int64)
        weight = np.concatenate([self._values(attributes[f"WEIGHTS_{n}"]) for n in sets], 1).astype(np.float64)
        total = weight.sum(1, keepdims=True)
        if not (total > 0).all() or len(total) != len(position):
            raise ValueError("a skinned vertex has no joint")
        weight /= total  # those of quantised files sum to one only up to rounding
        moved = np.empty_like(position)
        for first in range(0, len(position), _BLOCK):
            block = slice(first, first + _BLOCK)
            matrices = np.einsum("vj,vjrc->vrc", weight[block], joints[joint[block], :3])
            moved[block] = np.einsum("vrc,vc->vr", matrices[:, :, :3], position[block]) + matrices[:, :, 3]
        return moved

    def _values(self, number: int, extensions: Sequence[str] = ()) -> Array:
        """The accessor's values `[count, components]`, normalised integers as floats (sections 3.6.2 and 3.11)."""
        if number < 0:
            raise ValueError(f"accessor {number}")
        if number not in self.decoded:
            self.decoded[number] = self._decode(self.given["accessors"][number], extensions)
        return self.decoded[number]

    def _decode(self, accessor: Json, extensions: Sequence[str]) -> Array:
        dtype, columns, count = np.dtype(_TYPES[accessor["componentType"]]), accessor["type"], accessor["count"]
        components = _COMPONENTS[columns]
        if "bufferView" in accessor:
            values = self._read(accessor["bufferView"], accessor.get("byteOffset", 0), dtype, count, components)
        elif "sparse" not in accessor:
            # The specification makes these zeros unless an extension has the values: no surface either way.
            if extensions:
                _refuse(extensions[0])
            raise ValueError("a mesh without data (an accessor without bufferView)")
        else:
            self.generated += count
            if self.generated > _MAX_GENERATED:
                raise ValueError(f"declares {self.generated} elements without data, more than {_MAX_GENERATED}")
            values = np.zeros((count, components), dtype)
        if "sparse" in accessor:
            sparse = accessor["sparse"]
            where, what, changed = sparse["indices"], sparse["values"], sparse["count"]
            index_type = np.dtype(_TYPES[where["componentType"]])
            rows = self._read(where["bufferView"], where.get("byteOffset", 0), index_type, changed, 1).ravel()
            if changed and int(rows.max()) >= count:
                raise ValueError(f"a sparse accessor of {count} elements changes number {rows.max()}")
            values = values.copy()
            values[rows] = self._read(what["bufferView"], what.get("byteOffset", 0), dtype, changed, components)
        if accessor.get("normalized", False) and dtype.kind in "iu":
            # Section 3.11: signed values have one more negative step, which is -1 too.
            return np.maximum(values.astype(np.float64) / np.iinfo(dtype).max, -1)
        return values

    def _read(self, number: int, offset: int, dtype: np.dtype[Any], count: int, components: int) -> Array:
        """`[count, components]` from a buffer view, whose elements may be further apart than they are long."""
        view = self.given["bufferViews"][number]
        data = self._view(number)
        row = dtype.itemsize * components
        stride = view.get("byteStride", row)
        if count < 0 or offset < 0 or stride < row or (count and offset + (count - 1) * stride + row > len(data)):
            raise ValueError(f"truncated: {count} elements from byte {offset} of a buffer view of {len(data)} bytes")
        if not count:
            return np.zeros((0, components), dtype)
        strides = (stride, dtype.itemsize)
        return np.ndarray((count, components), dtype, data, offset, strides)

    def _view(self, number: int) -> bytes:
        """The bytes of a buffer view."""
        if number < 0:
            raise ValueError(f"buffer view {number}")
        view = self.given["bufferViews"][number]
        buffer = self.given["buffers"][view["buffer"]]
        if view["buffer"] not in self.buffers:
            own = self.binary if view["buffer"] == 0 else b""
            self.buffers[view["buffer"]] = _inline(buffer["uri"]) if "uri" in buffer else own
        data = self.buffers[view["buffer"]]
        start, length = view.get("byteOffset", 0), view["byteLength"]
        if start < 0 or length < 0 or start + length > len(data):
            names = sorted(buffer.get("extensions", {}) | view.get("extensions", {}))
            if names:
                _refuse(names[0])
            raise ValueError(f"truncated: a buffer view of {length} bytes from byte {start} of {len(data)}")
        return data[start : start + length]

    def _add(self, values: Array, kind: str) -> int:
        """Append an array; returns its accessor's number."""
        view = self._add_bytes(np.ascontiguousarray(values).tobytes())
        component = {"f": 5126, "u": 5125}[values.dtype.kind]
        self.accessors.append({"bufferView": view, "componentType": component, "count": len(values), "type": kind})
        return len(self.accessors) - 1

    def _add_bytes(self, data: bytes) -> int:
        """Append bytes; returns their buffer view's number."""
        self.body += bytes(-len(self.body) % 4)
        self.views.append({"buffer": 0, "byteOffset": len(self.body), "byteLength": len(data)})
        self.body += data
        if len(self.body) > _MAX_BODY:
            raise ValueError(f"its meshes, with morph targets and skins, take more than {_MAX_BODY} bytes")
        return len(self.views) - 1

    def _material(self, material: Json) -> Json:
        """Base colour and texture with the defaults of section 5.22, or the diffuse ones of an earlier extension."""
        pbr = material.get("pbrMetallicRoughness", {})
        colour, texture = pbr.get("baseColorFactor", [1.0, 1.0, 1.0, 1.0]), pbr.get("baseColorTexture")
        # KHR_materials_pbrSpecularGlossiness: its diffuse colour is the base colour of what is not a metal.
        if (gloss := material.get("extensions", {}).get("KHR_materials_pbrSpecularGlossiness")) is not None:
            colour, texture = gloss.get("diffuseFactor", [1.0, 1.0, 1.0, 1.0]), gloss.get("diffuseTexture")
        plain: Json = {"baseColorFactor": [float(value) for value in colour]}
        if texture is not None:
            plain["baseColorTexture"] = {"index": self._image(texture["index"])}
        # The name goes through trimesh, which drops samplers.
        return {"pbrMetallicRoughness": plain, "extras": texture, "name": self._wrapping(texture)}

    def _wrapping(self, texture: Json | None) -> str:
        """How a texture continues outside of its picture (section 5.26), for `point_clouds.wrapped`."""
        given = {} if texture is None else self.given["textures"][texture["index"]]
        sampler = self.given["samplers"][given["sampler"]] if "sampler" in given else {}
        return " ".join(_WRAPPINGS[sampler.get(axis, _REPEAT)] for axis in ("wrapS", "wrapT"))

    def _image(self, texture: int) -> int:
        """The number of a texture's image in the plain file, where each image is a texture."""
        given = self.given["textures"][texture]
        extensions = given.get("extensions", {})
        source = extensions.get("EXT_texture_webp", {}).get("source", given.get("source"))
        if source is None:
            if extensions:
                _refuse(min(extensions))
            raise ValueError("a texture without an image")
        if source not in self.image_numbers:
            image = self.given["images"][source]
            data = _inline(image["uri"]) if "uri" in image else self._view(image["bufferView"])
            try:
                Image.open(io.BytesIO(data), formats=_TEXTURES)
            except Exception as error:  # Pillow raises many kinds for broken headers
                raise ValueError(f"a texture is not a PNG, JPEG or WebP image: {type(error).__name__}") from error
            self.image_numbers[source] = len(self.images)
            self.images.append({"bufferView": self._add_bytes(data), "mimeType": image.get("mimeType", "image/png")})
        return self.image_numbers[source]

    def _texture_coordinates(self, material: int) -> str:
        """The attribute with the texture coordinates of a material's texture."""
        texture = self.materials[material].get("extras") or {}
        transform = texture.get("extensions", {}).get("KHR_texture_transform", {})
        return f"TEXCOORD_{transform.get('texCoord', texture.get('texCoord', 0))}"

    def _texture_transform(self, material: int) -> FloatArray:
        """`[3, 2]`: rows that map u and v, and an offset (KHR_texture_transform: offset, rotation, scale)."""
        texture = self.materials[material].get("extras") or {}
        transform = texture.get("extensions", {}).get("KHR_texture_transform", {})
        (x, y), angle = transform.get("scale", [1.0, 1.0]), transform.get("rotation", 0.0)
        sin, cos = math.sin(angle), math.cos(angle)
        return np.array([[cos * x, -sin * x], [sin * y, cos * y], transform.get("offset", [0.0, 0.0])])


def _inline(uri: str) -> bytes:
    """The bytes of a data URI; the caller has refused other URIs."""
    head, _, body = uri.partition(",")
    if not head.endswith(";base64"):
        raise ValueError("a data URI that is not base64")
    return base64.b64decode(body, validate=True)


def _triangles(indices: npt.NDArray[np.int64], mode: int) -> npt.NDArray[np.int64]:
    """Vertex numbers `[3 T]` of triangles, strips or fans (section 3.7.2.1)."""
    if mode == _TRIANGLES:
        if len(indices) % 3:
            raise ValueError(f"truncated: {len(indices)} indices are not triangles")
        return indices
    first = np.arange(max(0, len(indices) - 2))
    if mode == _STRIP:
        # Every second triangle of a strip is listed the other way round: two corners are swapped to keep its front.
        odd = first % 2
        corners = np.stack([first, first + 1 + odd, first + 2 - odd], 1)
    else:
        # All triangles of a fan share its first vertex.
        corners = np.stack([first + 1, first + 2, np.zeros_like(first)], 1)
    return indices[corners].ravel()


def _matrix(node: Json) -> FloatArray:
    """A node's matrix `[4, 4]` to its parent (section 3.5.3)."""
    if "matrix" in node:
        return np.array(node["matrix"], np.float64).reshape(4, 4).T
    # The rotation matrix of a unit quaternion; columns are then scaled, because scale is applied first.
    x, y, z, w = node.get("rotation", [0.0, 0.0, 0.0, 1.0])
    rotation = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    matrix = np.eye(4)
    matrix[:3, :3] = np.array(rotation) * np.array(node.get("scale", [1.0, 1.0, 1.0]))
    matrix[:3, 3] = node.get("translation", [0.0, 0.0, 0.0])
    return matrix
