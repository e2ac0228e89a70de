"""Tars of other writers than tarfile's default: several archives in a file, hard links, compressed ones.

The truth is GNU tar's: `tar --ignore-zeros --list` names the members that must be read.
"""

import gzip
import io
import shutil
import subprocess
import tarfile

import pytest
from media_samples import example

from megamm.common.errors import UserError
from megamm.data.raw.readers import READERS
from megamm.data.raw.samples import Broken, RawSample

PICTURE = example("image", 0)[0]
needs_tar = pytest.mark.skipif(shutil.which("tar") is None, reason="GNU tar is the truth")


def tar_of(*members, links=()):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, target, kind in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    return file.getvalue()


def read(raw, tmp_path):
    spool = tmp_path / "spool"
    spool.mkdir(exist_ok=True)
    return list(READERS["webdataset"](raw, spool))


def medium(part):
    with part.byte_range.file.open("rb") as file:
        file.seek(part.byte_range.offset)
        return file.read(part.byte_range.size)


@needs_tar
@pytest.mark.parametrize("zeros", [0, 512, 10240, 3 * 2**20])
def test_archives_behind_each_other_are_read_to_the_last(zeros, tmp_path):
    archives = [tar_of((f"{n}.png", PICTURE), (f"{n}.txt", f"text {n}".encode())) for n in range(3)]
    raw = tmp_path / "a.tar"
    raw.write_bytes((bytes(zeros)).join(archives))
    names = subprocess.run(["tar", "--ignore-zeros", "-tf", raw], capture_output=True, text=True, check=True).stdout
    samples = read(raw, tmp_path)
    assert sorted(names.split()) == sorted(f"{n}.{e}" for n in range(len(samples)) for e in ("png", "txt"))
    assert [sample.parts[0].content for sample in samples] == ["text 0", "text 1", "text 2"]
    assert all(medium(sample.parts[1]) == PICTURE for sample in samples)


def test_other_data_behind_an_archive_are_named(tmp_path):
    raw = tmp_path / "a.tar"
    whole = tar_of(("a.txt", b"one"), ("b.txt", b"two"))
    raw.write_bytes(whole + bytes(2048) + b"x" * 2000)
    broken, sample = read(raw, tmp_path)
    assert isinstance(broken, Broken) and "has other data than a tar at byte" in broken.reason
    assert isinstance(sample, RawSample) and sample.key == "a-a"  # others might have lost members
    raw.write_bytes(whole)
    assert [sample.parts[0].content for sample in read(raw, tmp_path)] == ["one", "two"]


def test_a_hard_link_is_the_file_that_the_tar_has_stored(tmp_path):
    links = [
        ("b.png", "a.png", tarfile.LNKTYPE),
        ("b.txt", "a.txt", tarfile.LNKTYPE),
        ("c.png", "b.png", tarfile.LNKTYPE),
        ("d.png", "../etc/passwd", tarfile.LNKTYPE),
        ("e.png", "later.png", tarfile.LNKTYPE),
        ("f.png", "a.png", tarfile.SYMTYPE),
    ]
    raw = tmp_path / "a.tar"
    raw.write_bytes(tar_of(("a.png", PICTURE), ("a.txt", b"one"), links=links))
    entries = read(raw, tmp_path)
    samples = [entry for entry in entries if isinstance(entry, RawSample)]
    assert [sample.key for sample in samples] == ["a-a", "a-b", "a-c"]
    assert all(medium(sample.parts[-1]) == PICTURE for sample in samples)
    assert [sample.parts[0].content for sample in samples[:2]] == ["one", "one"]
    assert {entry.what: entry.reason for entry in entries if isinstance(entry, Broken)} == {
        "a.tar:d.png": "a link",
        "a.tar:e.png": "a link",
        "a.tar:f.png": "a link",
    }


@pytest.mark.parametrize("name", ["b.tar.gz", "deep/b.tgz"])
def test_a_compressed_tar_among_others_is_not_left_out(name, tmp_path):
    raw = tmp_path / "raw"
    (raw / name).parent.mkdir(parents=True)
    (raw / "a.tar").write_bytes(tar_of(("a.txt", b"one")))
    (raw / name).write_bytes(gzip.compress(tar_of(("b.txt", b"two"))))
    with pytest.raises(UserError, match=r"1 of its tars are compressed, for example b\.t.*unpack them"):
        read(raw, tmp_path)
    (raw / name).rename(raw / "b.tar")
    assert [entry.reason for entry in read(raw, tmp_path) if isinstance(entry, Broken)] == [
        "unreadable: compressed; unpack it"
    ]
