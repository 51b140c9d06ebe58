"""ICC profiles made by hand: matrix profiles of any primaries, and grey ones."""

import struct

import numpy as np

#: Display P3's primaries on D65, and Adobe RGB's.
P3 = (0.3127, 0.3290, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060)
ADOBE = (0.3127, 0.3290, 0.640, 0.330, 0.210, 0.710, 0.150, 0.060)


def s15(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def xyz_of(chromaticities: tuple[float, ...]) -> np.ndarray:
    """Columns: XYZ of red, green, blue on the D50 white of profiles (Bradford)."""
    x, y = np.array(chromaticities[::2]), np.array(chromaticities[1::2])
    points = np.stack([x / y, np.ones(4), (1 - x - y) / y])
    matrix = points[:, 1:] * np.linalg.solve(points[:, 1:], points[:, 0])
    cone = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    gains = (cone @ np.array([0.9642, 1.0, 0.8249])) / (cone @ points[:, 0])
    return np.linalg.inv(cone) @ np.diag(gains) @ cone @ matrix


def profile(chromaticities: tuple[float, ...] | None, gamma: float) -> bytes:
    """A version 2 matrix profile (or, without primaries, a grey one) with a pure exponent."""
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78), b"cprt": b"text\0\0\0\0none\0"}
    tags[b"wtpt"] = b"XYZ \0\0\0\0" + s15(0.9642) + s15(1) + s15(0.8249)
    if chromaticities is None:
        tags[b"kTRC"] = curve
    else:
        for name, column in zip((b"r", b"g", b"b"), xyz_of(chromaticities).T, strict=True):
            tags[name + b"XYZ"] = b"XYZ \0\0\0\0" + b"".join(s15(value) for value in column)
            tags[name + b"TRC"] = curve
    table, data, offset = b"", b"", 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        value += bytes(-len(value) % 4)
        table += name + struct.pack(">II", offset + len(data), len(value))
        data += value
    space = b"GRAY" if chromaticities is None else b"RGB "
    size = offset + len(data)
    header = (
        struct.pack(">I", size) + bytes(4) + b"\x02\x10\0\0mntr" + space + b"XYZ " + bytes(12) + b"acsp" + bytes(28)
    )
    header += s15(0.9642) + s15(1) + s15(0.8249)
    return header + bytes(128 - len(header)) + struct.pack(">I", len(tags)) + table + data
