"""Corrupt and hostile raw data of every kind: skipped, counted and named; nothing is executed or written outside.

The files are generated here. Each is next to one good sample, and also in builds with broken files only. A kind
whose modality is not in the registry is also tried under its name: it must be rejected, too.
"""

import io
import json
import os
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from megamm.common.errors import UserError
from megamm.data.build.curation import CurationOptions
from megamm.data.build.media_check import MediaChecks, SkippedSample, check_sample
from megamm.data.build.shards import BuildOptions, build
from megamm.data.raw.samples import ByteRange, RawPart, RawSample
from megamm.modalities import REGISTRY
from megamm.shards.folder import ShardFolder

FREELY = BuildOptions(heldout=0, max_broken=1)
HARD_MEMORY_LIMIT = 2**30
"""Limit on the memory that a bomb may take, in bytes; the build's libraries are loaded before."""


class Evil:
    """Creates a file if it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bomb(width=100_000, height=100_000):
    """Return 10 gigapixels of zeros, compressed to some kB: valid in every part that is read."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    packer = zlib.compressobj(9)
    rows = packer.compress(bytes(10_000_000)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")


def wide_png():
    """Return a valid image 100,000 pixels wide and one pixel high."""
    header = struct.pack(">IIBBBBB", 100_000, 1, 8, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" + bytes(range(250)) * 400)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")


def wav(samples, rate=16000):
    """Return float samples as a WAV file, without checks."""
    data = np.asarray(samples, dtype="<f4").tobytes()
    form = struct.pack("<HHIIHH", 3, 1, rate, 4 * rate, 4, 32)
    chunks = b"fmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def npz(name="points", **arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def pickled_npz(target):
    """Return an .npz whose array is a pickle that creates a folder when it is loaded."""
    return npz(points=np.array([Evil(target)], dtype=object))


def zip_bomb():
    """Return an .npz of some kB that claims to hold 4 GB of points."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (2**27, 9)})
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("points.npy", header.getvalue() + bytes(10_000_000))
    return file.getvalue()


def mp4(cut):
    """Return a short video; cut: the share of its bytes to keep."""
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as film:
        stream = film.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for number in range(8):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 30 * number, dtype=np.uint8), format="rgb24")
            film.mux(stream.encode(frame))
        film.mux(stream.encode())
    return file.getvalue()[: int(cut * len(file.getvalue()))]


def jpeg():
    file = io.BytesIO()
    Image.new("RGB", (9, 9), "red").save(file, format="JPEG")
    return file.getvalue()


NO_FACES = b"v 0 0 0\nv 1 0 0\n"
TONE = 0.1 * np.sin(np.arange(16000) / 9)
BAD = {
    "image": {
        "empty.png": lambda evil: b"",
        "bomb.png": lambda evil: png_bomb(),
        "wide.png": lambda evil: wide_png(),
        "cut.png": lambda evil: wide_png()[:-30],
        "jpeg.png": lambda evil: jpeg(),
        "text.webp": lambda evil: b"RIFF....WEBP",
        "moving.gif": lambda evil: b"GIF89a",
        "script.svg": lambda evil: b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
    },
    "audio": {
        "empty.wav": lambda evil: b"",
        "nan.wav": lambda evil: wav(np.where(np.arange(16000) == 99, np.nan, TONE)),
        "inf.wav": lambda evil: wav(np.where(np.arange(16000) == 99, np.inf, TONE)),
        "silent.wav": lambda evil: wav(0 * TONE),
        "header.wav": lambda evil: wav(TONE)[:44],
        "wav.flac": lambda evil: wav(TONE),
        "png.ogg": lambda evil: wide_png(),
    },
    "video": {
        "empty.mp4": lambda evil: b"",
        "half.mp4": lambda evil: mp4(0.5),
        "header.mp4": lambda evil: mp4(0.02),
        "png.mp4": lambda evil: wide_png(),
        "playlist.mp4": lambda evil: b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n",
        "concat.mkv": lambda evil: b"ffconcat version 1.0\nfile /etc/hostname\n",
    },
    "points": {
        "empty.npz": lambda evil: b"",
        "pickled.npz": pickled_npz,
        "bomb.npz": lambda evil: zip_bomb(),
        "nan.npz": lambda evil: npz(points=np.full((64, 9), np.nan, dtype=np.float32)),
        "shape.npz": lambda evil: npz(points=np.zeros((64, 4), dtype=np.float32)),
        "name.npz": lambda evil: npz(other=np.zeros((64, 9), dtype=np.float32)),
        "no_faces.obj": lambda evil: NO_FACES,
        "cut.glb": lambda evil: b"glTF\x02\0\0\0\xff\xff\0\0",
        "include.obj": lambda evil: b"mtllib /etc/hostname\nv 0 0 0\nf 1 1 1\n",
    },
}
CASES = [(modality, name) for modality, files in BAD.items() for name in files]


def test_every_modality_with_files_has_bad_ones():
    assert set(REGISTRY) - {"text"} <= set(BAD)


def lines(folder, *entries):
    """Write a raw folder with one good sample and these lines."""
    folder.mkdir(exist_ok=True)
    entries = ({"key": "good", "text": "good"}, *entries)
    (folder / "samples.jsonl").write_text("\n".join(e if isinstance(e, str) else json.dumps(e) for e in entries))
    return folder


def built(tmp_path, raw, options=FREELY, workers=0):
    """Return the report; only the good sample is in the shards, and no other file was created."""
    before = set(tmp_path.rglob("*"))
    (report,) = build([raw], tmp_path / "shards", options, workers)
    texts = ShardFolder(tmp_path / "shards" / raw.name / "train" / "text")
    assert [key.rpartition("-")[2] for key in texts.keys] == ["good"] and report.train == 1
    new = set(tmp_path.rglob("*")) - before
    assert all(path.is_relative_to(tmp_path / "shards") for path in new)
    assert not [path for path in new if path.is_symlink() or path.name == "evil"]
    return report


@pytest.mark.parametrize(("modality", "name"), CASES)
def test_a_bad_medium_is_named(tmp_path, modality, name):
    raw = lines(tmp_path / "raw", {"key": "bad", modality: name, "text": "text of the bad one"})
    (raw / name).write_bytes(BAD[modality][name](tmp_path / "evil"))
    if modality not in REGISTRY:  # then the line has one part fewer, and the field is named instead
        raw = lines(raw, {"key": "bad", modality: name})
        report = built(tmp_path, raw)
        assert "no parts" in report.left_out["broken"][0]["reason"]
        return
    report = built(tmp_path, raw)
    entries = [entry for found in report.left_out.values() for entry in found]
    assert len(entries) == 1 and entries[0]["what"] == name and entries[0]["reason"]
    assert "\n" not in entries[0]["reason"]


def test_every_modality_survives_noise_zero_bytes_and_another_ones_file(tmp_path):
    """Each of its extensions with contents of other types, all in one build in a worker process."""
    noise = np.random.default_rng(0).bytes(5000)
    contents = [wide_png(), wav(TONE), npz(points=np.zeros((9, 2))), b"", b"\0" * 1000, b"text\n", noise]
    raw = tmp_path / "raw"
    raw.mkdir()
    entries = []
    for modality in set(REGISTRY) - {"text"}:
        for ending in REGISTRY[modality].extensions:
            for number, data in enumerate(contents):
                entries.append({modality: f"{number}.{ending}"})
                (raw / f"{number}.{ending}").write_bytes(data)
    names = {name for entry in entries for name in entry.values()}
    # An image and a tone also appear once each with their correct extension.
    own = {"0.png", "1.wav"} & names
    options = BuildOptions(heldout=0, max_broken=1, curation=CurationOptions(max_aspect=1e6, min_side=1))
    (report,) = build([lines(raw, *entries)], tmp_path / "shards", options, 1)
    assert {entry["what"] for entry in report.left_out["broken"]} == names - own
    assert report.train == 1 + len(own)


def test_a_bomb_takes_no_memory(tmp_path):
    """100,000 x 100,000 pixels are rejected from the header: this process's peak memory hardly rises."""
    resource = pytest.importorskip("resource")
    raw = lines(tmp_path / "raw", {"image": "bomb.png"})
    (raw / "bomb.png").write_bytes(png_bomb())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = built(tmp_path, raw)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < HARD_MEMORY_LIMIT
    assert "67108864 pixels" in report.left_out["broken"][0]["reason"]


TEXTS = {
    "nul": ({"text": "a\0b"}, "NUL"),
    "nul in a caption": ({"caption": "a\0b"}, "NUL"),
    "surrogate": ('{"text": "\\ud800"}', "surrogate"),
    "no text": ({"text": " \n "}, 'no "text"'),
    "no json": ("{", "not JSON"),
    "no utf-8": ('{"text": "\udcff"}', "not JSON"),
    "deep": ("[" * 100_000, "not JSON"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_bad_text_is_named(tmp_path, case):
    line, reason = TEXTS[case]
    raw = lines(tmp_path / "raw")
    with (raw / "samples.jsonl").open("a", errors="surrogateescape") as file:
        file.write("\n" + (line if isinstance(line, str) else json.dumps(line)))
    (entry,) = built(tmp_path, raw).left_out["broken"]
    assert reason in entry["reason"] and entry["what"] in ("samples.jsonl:2", "raw-00000002")


@pytest.mark.parametrize(
    "path", ["../secret.png", "/etc/hostname", "a/../../secret.png", "link.png", "folder", "pipe.png"]
)
def test_a_bad_path_is_named(tmp_path, path):
    raw = lines(tmp_path / "raw", {"image": path})
    (tmp_path / "secret.png").write_bytes(wide_png())
    (raw / "link.png").symlink_to(tmp_path / "secret.png")
    (raw / "folder").mkdir()
    os.mkfifo(raw / "pipe.png")
    (entry,) = built(tmp_path, raw).left_out["broken"]
    assert any(why in entry["reason"] for why in ("leads outside the folder", "not a regular file", "is not one of"))


def test_a_hostile_tar_is_read_and_not_extracted(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    with tarfile.open(raw / "0.tar", "w") as file:
        for name, kind, target in [
            ("../../evil.txt", tarfile.REGTYPE, ""),
            (str(tmp_path / "evil.txt"), tarfile.REGTYPE, ""),
            ("link.png", tarfile.SYMTYPE, "/etc/hostname"),
            ("hard.png", tarfile.LNKTYPE, "/etc/hostname"),
            ("device.png", tarfile.CHRTYPE, ""),
            ("pipe.png", tarfile.FIFOTYPE, ""),
            ("good.txt", tarfile.REGTYPE, ""),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, target, 4 if kind == tarfile.REGTYPE else 0
            file.addfile(info, io.BytesIO(b"text"))
    report = built(tmp_path, raw, BuildOptions(heldout=0, max_broken=1, form="webdataset"))
    assert len(report.left_out["broken"]) == 6


def test_too_many_bad_ones_stop_the_build_with_the_first_named(tmp_path):
    raw = lines(tmp_path / "raw", {"text": "a\0b"})
    with pytest.raises(UserError, match=r"1 of 2 samples are broken, more than 2\.0%.*NUL"):
        build([raw], tmp_path / "shards", BuildOptions())
    assert list((tmp_path / "shards").iterdir()) == []


def test_a_medium_that_its_tar_cuts_off_is_named(tmp_path):
    """The tar was whole when its headers were read; another program shortened it afterwards."""
    (tmp_path / "0.tar").write_bytes(wide_png()[:100])
    part = RawPart("image", "0.tar:a.png", ByteRange(tmp_path / "0.tar", 0, 200))
    checks = MediaChecks(tmp_path, 32, CurationOptions(), frozenset(), REGISTRY)
    found = check_sample(RawSample("k", "noun", (part,)), checks)
    assert found == SkippedSample("broken", "0.tar:a.png", "truncated")
