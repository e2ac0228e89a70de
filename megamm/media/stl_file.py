"""STL files, binary and text, to a mesh: every facet of the file or a reason.

The data count: a binary file whose header has no number of facets is read to its end, and one that has another number
than its data is refused. The stored normals are not used, because many programs write none: a facet's corners say which
side is outside. The two attribute bytes of a facet are ignored, as no standard gives them a meaning.
"""

from typing import TYPE_CHECKING

import numpy as np

from megamm.media.point_clouds import FloatArray

if TYPE_CHECKING:
    import trimesh

_HEADER = 84
"""Bytes: 80 of any text, and the number of facets."""
_FACET = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
_UNKNOWN = (0, 0xFFFFFFFF)
"""Numbers of facets of programs that write to a pipe."""
_OPENS = {"facet": "solid", "outer": "facet", "vertex": "outer"}
"""Keyword of a line -> the keyword that it stands in."""
_CLOSES = {"endloop": "outer", "endfacet": "facet", "endsolid": "solid"}


def mesh_of_stl(data: bytes) -> "trimesh.Trimesh":
    """The facets of an STL file. Raises ValueError if it is broken or truncated."""
    import trimesh

    facets = int.from_bytes(data[80:_HEADER], "little")
    # Some binary files begin with "solid", the first word of the text form, so the length decides.
    is_text = data.lstrip()[:5].lower() == b"solid" and len(data) != _HEADER + facets * _FACET.itemsize
    corners = _text_corners(data) if is_text else _binary_corners(data, facets)
    faces = np.arange(len(corners) * 3).reshape(-1, 3)
    return trimesh.Trimesh(corners.reshape(-1, 3), faces, process=False, validate=False)


def _binary_corners(data: bytes, facets: int) -> FloatArray:
    """Corners `[F, 3, 3]` of a binary file with this number of facets in its header."""
    rest = len(data) - _HEADER
    if rest < 0:
        raise ValueError("not an STL file: too short")
    if facets in _UNKNOWN and rest % _FACET.itemsize == 0:
        facets = rest // _FACET.itemsize
    if rest != facets * _FACET.itemsize:
        what = "truncated" if rest < facets * _FACET.itemsize else "has data after its last facet"
        raise ValueError(f"{what}: {facets} facets declared, {rest / _FACET.itemsize:.1f} stored")
    return np.frombuffer(data, _FACET, offset=_HEADER)["corners"].astype(np.float64)


def _text_corners(data: bytes) -> FloatArray:
    """Corners `[F, 3, 3]` of a text file of one or more solids."""
    corners: list[list[float]] = []
    # The blocks that are open, outermost first: solid, facet, outer.
    inside: list[str] = []
    facets = 0
    for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        keyword = words[0].lower()
        parent = inside[-1] if inside else None
        if keyword == "solid" and parent is None:
            inside.append(keyword)
        elif keyword == "vertex" and parent == _OPENS[keyword] and len(words) == 4:
            corners.append([float(word) for word in words[1:]])
        elif keyword in _OPENS and keyword != "vertex" and parent == _OPENS[keyword]:
            inside.append(keyword)
        elif keyword in _CLOSES and parent == _CLOSES[keyword]:
            inside.pop()
            facets += keyword == "endfacet"
            if keyword == "endfacet" and len(corners) != 3 * facets:
                raise ValueError(f"line {number}: a facet that is not a triangle")
        else:
            raise ValueError(f"line {number} cannot follow in a text STL file: {line[:60]!r}")
    if inside:
        raise ValueError(f"truncated: its last {inside[-1]} has no end")
    return np.array(corners, np.float64).reshape(-1, 3, 3)
