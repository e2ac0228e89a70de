"""Polygons of obj and ply files -> triangles with the same outline and area, also where a polygon is concave.

Most readers split a polygon into a fan of triangles from its first corner. That is right only if the whole polygon is
visible from this corner; otherwise triangles overlap and reach outside. Here a fan is used where it is right, and ear
clipping (mapbox_earcut) elsewhere, in the plane of the polygon's normal (Newell's method: Sutherland et al. 1974, "A
Characterization of Ten Hidden-Surface Algorithms").
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from megamm.media.point_clouds import MAX_COORDINATE, CloudArray

if TYPE_CHECKING:
    import trimesh

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

_FAN_TOLERANCE = 1e-9
"""Area that a fan may cover twice, as a share of the polygon's area: rounding, not an overlap."""
_EAR_TOLERANCE = 1e-6
_UNSUPPORTED_OBJ = frozenset({"curv", "curv2", "surf"})
"""Free-form geometry: it is not made of polygons, and reading only the polygons beside it would lose a part."""


def triangulated(vertices: FloatArray, polygons: Sequence[Sequence[int]]) -> tuple[IntArray, IntArray]:
    """Triangles `[T, 3]` of polygons of any length, in their order, and the polygon's number of each `[T]`.

    Indices are into `vertices` `[V, 3]`. Polygons of fewer than three corners have no triangle.
    """
    lengths = np.fromiter((len(polygon) for polygon in polygons), np.int64, len(polygons))
    triangles, owners = [np.zeros((0, 3), np.int64)], [np.zeros(0, np.int64)]
    for length in np.unique(lengths[lengths >= 3]).tolist():
        numbers = np.flatnonzero(lengths == length)
        corners = np.array([polygons[number] for number in numbers.tolist()], np.int64)
        fans = np.stack(
            [np.stack([corners[:, 0], corners[:, k], corners[:, k + 1]], 1) for k in range(1, length - 1)], 1
        )
        fits = _fan_fits(vertices[corners]) if length > 3 else np.ones(len(corners), bool)
        triangles.append(fans[fits].reshape(-1, 3))
        owners.append(np.repeat(numbers[fits], length - 2))
        for number, polygon in zip(numbers[~fits].tolist(), corners[~fits], strict=True):
            ears = polygon[_ears(vertices[polygon])]
            triangles.append(ears)
            owners.append(np.full(len(ears), number))
    owner = np.concatenate(owners)
    order = np.argsort(owner, kind="stable")
    return np.concatenate(triangles)[order], owner[order]


def _normals(corners: FloatArray) -> FloatArray:
    """Newell's normals `[M, 3]` of polygons `[M, n, 3]`, twice their area long; the first corner is the origin."""
    local = corners - corners[:, :1]
    return np.cross(local, np.roll(local, -1, axis=1)).sum(1)


def _fan_fits(corners: FloatArray) -> npt.NDArray[np.bool_]:
    """Whether the fan from the first corner covers each polygon `[M, n, 3]` once: no triangle of it is turned over."""
    normals = _normals(corners)
    local = corners[:, 1:] - corners[:, :1]
    area = (np.cross(local[:, :-1], local[:, 1:]) * normals[:, None]).sum(2)
    # NaN and Inf compare false; the caller's check of coordinates reports them.
    return ~((np.abs(area).sum(1) - area.sum(1)) > _FAN_TOLERANCE * np.abs(area).sum(1))


def _ears(corners: FloatArray) -> IntArray:
    """Triangles `[T, 3]` of one polygon `[n, 3]` by ear clipping, as indices of its corners, in its orientation."""
    import mapbox_earcut

    normal = _normals(corners[None])[0]
    # Two axes in the polygon's plane; the largest component of the normal is not theirs, so they are well conditioned.
    helper = np.eye(3)[np.abs(normal).argmin()]
    right = np.cross(helper, normal)
    up = np.cross(normal, right)
    axes = np.stack([right / np.linalg.norm(right), up / np.linalg.norm(up)], 1)
    flat = np.ascontiguousarray((corners - corners[0]) @ axes)
    found = mapbox_earcut.triangulate_float64(flat, np.array([len(flat)], np.uint32)).astype(np.int64).reshape(-1, 3)
    # Earcut does not keep the direction of rotation, from which faces get their normals.
    a, b, c = (flat[found[:, k]] for k in range(3))
    doubled = (b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (b[:, 1] - a[:, 1]) * (c[:, 0] - a[:, 0])
    # The normal is as long as twice the area that the outline encloses; one that crosses itself has no such surface.
    enclosed = float(np.linalg.norm(normal))
    if not abs(np.abs(doubled).sum() - enclosed) <= _EAR_TOLERANCE * enclosed:
        raise ValueError(f"a face of {len(corners)} corners crosses itself; split it into triangles")
    found[doubled < 0] = found[doubled < 0][:, ::-1]
    return found


def mesh_of_obj(data: bytes) -> "trimesh.Trimesh":
    """The faces of an obj file with the colours of its vertices. Raises ValueError if a line is wrong.

    Corners with negative numbers count back from the last vertex before their line. Materials are in other files.
    """
    import trimesh

    vertices: list[list[float]] = []
    polygons: list[list[int]] = []
    # A backslash at the end continues a line. A single CR ends lines only in a file without LF.
    text = re.sub(r"\\\r?\n", " ", data.decode("utf-8-sig", "replace"))
    for line in text.split("\n" if "\n" in text else "\r"):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if words[0] == "v":
            if len(words) < 4:
                raise ValueError(f"a vertex without three coordinates: {line[:80]!r}")
            vertices.append([float(word) for word in words[1:]])
        elif words[0] in ("f", "fo"):  # "fo" is the name of faces in old files
            polygons.append([_corner(word, len(vertices)) for word in words[1:]])
        elif words[0] in _UNSUPPORTED_OBJ:
            raise ValueError(f"has free-form geometry ({words[0]}), only polygons are supported")
        elif words[0][0] in "vf" and words[0] not in ("vt", "vn", "vp"):
            # Ignored like other unknown lines, a damaged line would be a hole in the mesh.
            raise ValueError(f"has a line that begins with {words[0][:20]!r}, which is not a keyword of obj")
    if not vertices:
        raise ValueError("has no vertices")
    xyz = np.array([vertex[:3] for vertex in vertices], np.float64)
    highest = max((max(polygon, default=0) for polygon in polygons), default=0)
    if highest >= len(xyz):
        raise ValueError(f"a face refers to vertex {highest + 1} of {len(xyz)}")
    faces, _ = triangulated(xyz, polygons)
    return trimesh.Trimesh(xyz, faces, vertex_colors=_obj_colours(vertices), process=False, validate=False)


def _corner(word: str, known: int) -> int:
    """Vertex index, from 0, of a face's corner such as "7", "7/1/3" or "-1"; `known`: vertices before its line."""
    number = int(word.partition("/")[0])
    if number == 0 or number < -known:
        raise ValueError(f"a face refers to vertex {number} where {known} are known")
    return number - 1 if number > 0 else known + number


def _obj_colours(vertices: list[list[float]]) -> FloatArray | None:
    """RGB `[V, 3]` in [0, 1] behind the coordinates; None if there are none. Some files have 0 to 255 instead."""
    # Three coordinates, possibly with a weight (4 numbers), or with three or four values of a colour.
    coloured = sum(len(vertex) >= 6 for vertex in vertices)
    if not coloured:
        return None
    if coloured < len(vertices):
        raise ValueError(f"only {coloured} of {len(vertices)} vertices have a colour")
    colours = np.array([vertex[3:6] for vertex in vertices], np.float64)
    return _float_colours(colours)


def read_ply(data: bytes) -> "trimesh.Trimesh | CloudArray":
    """The faces of a ply file, of any mixture of lengths, with the colours of its vertices or faces.

    A file without faces is a cloud `[M, 9]`. Raises ValueError if it is broken. Textures are in other files.
    """
    import trimesh

    elements = _ply_elements(data)
    if kinds := {"tristrips", "edge"} & set(elements):
        raise ValueError(f"has {min(kinds)} elements; store all as faces")
    if "vertex" not in elements:
        raise ValueError("has no vertices")
    if "face" not in elements:
        return _cloud_of_ply(elements["vertex"])
    vertex, face = elements["vertex"], elements["face"]
    xyz = np.column_stack([np.asarray(vertex[axis], np.float64) for axis in "xyz"])
    polygons = face.get("vertex_indices", face.get("vertex_index"))
    if polygons is None:
        raise ValueError(f"its faces have no vertex_indices but {', '.join(face)}")
    low = min((min(polygon, default=0) for polygon in polygons), default=0)
    high = max((max(polygon, default=0) for polygon in polygons), default=0)
    if low < 0 or high >= len(xyz):
        raise ValueError(f"a face refers to vertex {low if low < 0 else high} of {len(xyz)}")
    faces, owner = triangulated(xyz, polygons)
    options: dict[str, Any] = {}
    if (colours := _ply_colours(vertex)) is not None:
        options["vertex_colors"] = colours
    elif (colours := _ply_colours(face)) is not None:
        options["face_colors"] = colours[owner]
    return trimesh.Trimesh(xyz, faces, process=False, validate=False, **options)


def _cloud_of_ply(vertex: dict[str, "Column"]) -> CloudArray:
    """Position, normal of length 1 and colour of the vertices `[M, 9]`; grey, as a mesh, if they have no colours."""
    if not {"nx", "ny", "nz"} <= set(vertex):
        raise ValueError("has no faces, and no normals (nx, ny, nz) as a point cloud needs; compute them with Open3D")
    xyz, normals = (
        np.column_stack([np.asarray(vertex[name], np.float64) for name in names])
        for names in (("x", "y", "z"), ("nx", "ny", "nz"))
    )
    lengths = np.linalg.norm(normals, axis=1, keepdims=True)
    if not (np.isfinite(lengths) & (lengths > 0)).all():
        raise ValueError("has normals that are zero, NaN or Inf")
    if not (np.abs(xyz) < MAX_COORDINATE).all():
        raise ValueError("has coordinates that are NaN, Inf or too large")
    colours = _ply_colours(vertex)
    colours = np.full_like(xyz, _UNCOLOURED) if colours is None else colours
    return np.concatenate([xyz, normals / lengths, colours], axis=1).astype(np.float32)


_UNCOLOURED = 102 / 255
"""The grey that trimesh gives to meshes without colours."""
_PLY_TYPES = {
    "char": "i1",
    "uchar": "u1",
    "short": "i2",
    "ushort": "u2",
    "int": "i4",
    "uint": "u4",
    "float": "f4",
    "double": "f8",
}
_PLY_TYPES |= {f"{name}{8 * size}": f"{name[0]}{size}" for name in ("int", "uint") for size in (1, 2, 4, 8)}
_PLY_TYPES |= {"float32": "f4", "float64": "f8"}
_PLY_ORDERS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}
Column = Any
"""The values of a property: an array `[M]`, or for a list property M lists."""


def _ply_elements(data: bytes) -> dict[str, dict[str, Column]]:
    """{element: {property: column}} of the elements that have members."""
    head, end, body = data.partition(b"end_header")
    if not end:
        raise ValueError("truncated: its header has no end")
    # The body begins after the line's end: LF, CR LF or CR.
    body = body[2:] if body.startswith(b"\r\n") else body[1:]
    order, counts, properties = None, dict[str, int](), dict[str, dict[str, tuple[str, ...]]]()
    for words in (line.split() for line in head.decode("latin-1").splitlines()):
        if words[:1] == ["format"]:
            order = _PLY_ORDERS[words[1]]
        elif words[:1] == ["element"]:
            counts[words[1]], properties[words[1]] = int(words[2]), {}
        elif words[:1] == ["property"]:
            # "property float x" or "property list uchar int vertex_indices"
            types = words[2:4] if words[1] == "list" else words[1:2]
            properties[list(counts)[-1]][words[-1]] = tuple((order or "") + _PLY_TYPES[word] for word in types)
    if order is None:
        raise ValueError("its header has no format")
    reader = _AsciiPly(body) if order == "" else _BinaryPly(body)
    elements = {name: reader.element(count, properties[name]) for name, count in counts.items()}
    if reader.rest():
        raise ValueError("has data after its last element: the header declares too little")
    return {name: columns for name, columns in elements.items() if counts[name]}


class _AsciiPly:
    """Reads elements from a body of text, each row from a line of its own."""

    def __init__(self, body: bytes) -> None:
        self.rows, self.at = [words for line in body.splitlines() if (words := line.split())], 0

    def rest(self) -> bool:
        """Whether some of the body is not read."""
        return self.at < len(self.rows)

    def element(self, count: int, properties: dict[str, tuple[str, ...]]) -> dict[str, Column]:
        """The columns of the next element."""
        columns: dict[str, list[Any]] = {name: [] for name in properties}
        kinds = [(columns[name].append, len(types) == 2) for name, types in properties.items()]
        if count > len(self.rows) - self.at:
            raise ValueError(f"truncated: {len(self.rows) - self.at} of {count} rows")
        for words in self.rows[self.at : self.at + count]:
            at = 0
            for append, is_list in kinds:
                if at >= len(words):
                    raise ValueError(f"truncated: a row of {len(words)} values")
                if not is_list:
                    append(float(words[at]))
                    at += 1
                    continue
                length = int(words[at])
                row = words[at + 1 : at + 1 + length]
                if length < 0 or len(row) < length:
                    raise ValueError(f"truncated: a list of {length} values has {len(row)}")
                append([int(float(word)) for word in row])
                at += 1 + length
            if at < len(words):
                raise ValueError(f"a row of {at} values has {len(words)}")
        self.at += count
        return {
            name: columns[name] if len(types) == 2 else np.array(columns[name]).astype(types[0])
            for name, types in properties.items()
        }


class _BinaryPly:
    """Reads elements from a binary body, one after the other."""

    def __init__(self, body: bytes) -> None:
        self.body, self.at = body, 0

    def rest(self) -> bool:
        """Whether some of the body is not read; line ends at the end do not count."""
        return bool(self.body[self.at :].strip(b"\r\n"))

    def element(self, count: int, properties: dict[str, tuple[str, ...]]) -> dict[str, Column]:
        """The columns of the next element."""
        if not count:
            return {}
        # Lists of the same length in all rows, as in a file of triangles, are read at once.
        row = self._row(properties)
        if self.at + count * row.itemsize <= len(self.body):
            table = np.frombuffer(self.body, row, count, self.at)
            lengths = [name for name in table.dtype.names or () if name.startswith("length of ")]
            if all((table[name] == table[name][0]).all() for name in lengths):
                self.at += count * row.itemsize
                return {
                    name: table[name].tolist() if len(types) == 2 else table[name] for name, types in properties.items()
                }
        columns: dict[str, list[Any]] = {name: [] for name in properties}
        kinds = [(columns[name].append, [np.dtype(t) for t in types]) for name, types in properties.items()]
        for _ in range(count):
            for append, types in kinds:
                values = self._next(types[0], 1)
                append(self._next(types[1], int(values[0])).tolist() if len(types) == 2 else values[0])
        return {
            name: columns[name] if len(types) == 2 else np.array(columns[name], types[0])
            for name, types in properties.items()
        }

    def _row(self, properties: dict[str, tuple[str, ...]]) -> np.dtype[Any]:
        """The dtype of a row whose lists have the lengths of the next one."""
        fields: list[tuple[Any, ...]] = []
        at = self.at
        for name, types in properties.items():
            first = np.dtype(types[0])
            if len(types) == 2:
                length = int(np.frombuffer(self.body, first, 1, at)[0])
                if not 0 <= length <= len(self.body):
                    raise ValueError(f"truncated: a list of {length} values")
                fields.append((f"length of {name}", first))
                fields.append((name, types[1], (length,)))
                at += length * np.dtype(types[1]).itemsize
            else:
                fields.append((name, first))
            at += first.itemsize
        return np.dtype(fields)

    def _next(self, dtype: np.dtype[Any], count: int) -> npt.NDArray[Any]:
        if count < 0 or self.at + count * dtype.itemsize > len(self.body):
            raise ValueError(f"truncated: {count} values from byte {self.at} of {len(self.body)}")
        values = np.frombuffer(self.body, dtype, count, self.at)
        self.at += count * dtype.itemsize
        return values


def _ply_colours(columns: dict[str, Column]) -> FloatArray | None:
    """RGB `[M, 3]` in [0, 1] of an element's columns; None if it has none."""
    columns = {name.lower(): values for name, values in columns.items()}
    for wanted in (("red", "green", "blue"), ("diffuse_red", "diffuse_green", "diffuse_blue"), ("r", "g", "b")):
        if set(wanted) <= set(columns):
            values = [np.asarray(columns[name]) for name in wanted]
            # Wider and signed integers hold the same 0 to 255.
            if values[0].dtype.kind == "u" and values[0].dtype.itemsize <= 2:
                return np.column_stack([v.astype(np.float64) / np.iinfo(v.dtype).max for v in values])
            return _float_colours(np.column_stack(values).astype(np.float64))
    return None


def _float_colours(colours: FloatArray) -> FloatArray:
    """Colours in [0, 1]; a file with larger values has them from 0 to 255."""
    if not np.isfinite(colours).all() or colours.min() < 0 or colours.max() > 255:
        raise ValueError("has colours that are NaN, negative or above 255")
    return colours / 255 if colours.max() > 1 else colours
