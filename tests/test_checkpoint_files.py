"""A rank's image with O_DIRECT: the same bytes and digest in every size, also where the file system rejects it."""

import errno
import fcntl
import mmap
import os
import random

import pytest
import xxhash

from megamm.checkpoint import files

PAGE = mmap.PAGESIZE
SIZES = [0, 1, 64, PAGE - 1, PAGE, PAGE + 64, 5 * PAGE, 5 * PAGE + 4032]


class Disk:
    """Replaces `os` in megamm.checkpoint.files; writes: bytes of each, and whether it was direct."""

    def __init__(self, refuses: str = "", after: int = 0, most: int = 1 << 30) -> None:
        """refuses: "open" or "write" with O_DIRECT, the latter `after` that many; most: maximum bytes per write."""
        self.refuses, self.after, self.most, self.writes = refuses, after, most, list[tuple[int, bool]]()

    def __getattr__(self, name):
        return getattr(os, name)

    def open(self, path, flags, mode):
        if self.refuses == "open" and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return os.open(path, flags, mode)

    def write(self, descriptor, data):
        direct = bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)
        if direct and ((self.refuses == "write" and len(self.writes) >= self.after) or len(data) % PAGE):
            raise OSError(errno.EINVAL, "Invalid argument")
        done = os.write(descriptor, data[: self.most])
        self.writes.append((done, direct))
        return done


def written(monkeypatch, path, size, disk):
    """Return the reported reason; the file and its entry must match the image."""
    image = mmap.mmap(-1, max(size, PAGE))
    data = random.Random(size).randbytes(size)
    image[:size] = data
    monkeypatch.setattr(files, "os", disk)
    monkeypatch.setattr(files, "DIRECT_PIECE", 2 * PAGE)
    path.write_bytes(b"longer than this one" * PAGE)
    entry, why = files.write_direct(path, memoryview(image)[:size])
    assert path.read_bytes() == data
    assert (entry.size, entry.digest) == (size, xxhash.xxh3_128(data).hexdigest())
    return why


def takes_direct(folder):
    try:
        descriptor = os.open(folder / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o644)
    except OSError:
        return False
    try:
        return os.write(descriptor, mmap.mmap(-1, PAGE)) == PAGE
    except OSError:
        return False
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("size", SIZES)
def test_all_but_the_end_goes_past_the_cache(monkeypatch, tmp_path, size):
    if not takes_direct(tmp_path):
        pytest.skip("this file system has no O_DIRECT")
    disk = Disk()
    assert written(monkeypatch, tmp_path / "image", size, disk) == ""
    assert sum(done for done, direct in disk.writes if direct) == size - size % PAGE
    assert [direct for _, direct in disk.writes] == sorted((d for _, d in disk.writes), reverse=True)


@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize("refuses, after", [("open", 0), ("write", 0), ("write", 1)])
def test_refused_it_goes_through_the_cache(monkeypatch, tmp_path, size, refuses, after):
    disk = Disk(refuses, after)
    why = written(monkeypatch, tmp_path / "image", size, disk)
    was_refused = refuses == "open" or size - size % PAGE > after * 2 * PAGE
    assert bool(why) == was_refused
    assert not any(direct for _, direct in disk.writes[after:])


def test_a_write_that_takes_less_goes_on(monkeypatch, tmp_path):
    for most in (PAGE, PAGE + 512, 100):
        disk = Disk(most=most)
        written(monkeypatch, tmp_path / str(most), 3 * PAGE + 64, disk)
        assert max(done for done, _ in disk.writes) <= most


def test_no_space_is_no_reason_to_go_on(monkeypatch, tmp_path):
    disk = Disk()
    disk.write = lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        written(monkeypatch, tmp_path / "image", PAGE, disk)
