"""ICC profiles from their definition (ICC.1:2022), for pictures whose right colours are known by hand."""

import struct

import numpy as np

DISPLAY_P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
SRGB = ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060))
D65, D50 = np.array([0.3127 / 0.3290, 1, 0.3583 / 0.3290]), np.array([0.9642, 1, 0.8249])
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def to_xyz(primaries):
    """Return the matrix from linear RGB to XYZ, white D65 (Lindbloom)."""
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
    return columns * np.linalg.solve(columns, D65)


def _fixed(*values):
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def _curve(gamma):
    """Return a curve: sRGB's for None (parametric, type 3), else a power."""
    if gamma is None:
        return b"para" + bytes(4) + struct.pack(">HH", 3, 0) + _fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    return b"para" + bytes(4) + struct.pack(">HH", 0, 0) + _fixed(gamma)


def _xyz(values):
    return b"XYZ " + bytes(4) + _fixed(*values)


def _profile(space, pcs, device_class, tags):
    """Assemble header, table of tags and tags, each aligned to 4 bytes."""
    tags = {"desc": b"mluc" + bytes(4) + struct.pack(">II", 0, 12), "wtpt": _xyz(D50), **tags}
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += struct.pack(">4sII", name.encode(), start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    header = struct.pack(">I4sI4s4s4s", start + len(body), b"", 0x04300000, device_class, space, pcs)
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + _fixed(*D50)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def rgb(primaries, gamma=None):
    """Return a profile of a display with these primaries, adapted to D50 (Bradford)."""
    adapt = np.linalg.inv(_BRADFORD) @ np.diag((_BRADFORD @ D50) / (_BRADFORD @ D65)) @ _BRADFORD
    columns = (adapt @ to_xyz(primaries)).T
    names = ("rXYZ", "gXYZ", "bXYZ")
    tags = {name: _xyz(column) for name, column in zip(names, columns, strict=True)}
    return _profile(b"RGB ", b"XYZ ", b"mntr", tags | {name: _curve(gamma) for name in ("rTRC", "gTRC", "bTRC")})


def grey(gamma):
    """Return a profile of grey pixels that store light ** (1 / gamma)."""
    return _profile(b"GRAY", b"XYZ ", b"mntr", {"kTRC": _curve(gamma)})


def cmyk(lab_of):
    """Return a profile of a printer: lab_of(c, m, y, k) at every corner, each ink 0 or 1; linear in between."""
    corners = [(c, m, y, k) for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)]
    grid = b"".join(
        bytes([round(lab[0] * 255 / 100), round(lab[1] + 128), round(lab[2] + 128)])
        for lab in (lab_of(*corner) for corner in corners)
    )
    ramp = bytes(range(256))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + _fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + ramp * 4 + grid + ramp * 3
    return _profile(b"CMYK", b"Lab ", b"prtr", {"A2B0": table})
