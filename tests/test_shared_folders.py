"""Shared folders (tests/lib/shared.py): made once for any number of concurrent requests; a failure is not cached."""

import fcntl
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import shared


@pytest.fixture
def session(tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "_session", tmp_path)


def test_a_folder_is_made_once(session):
    """Locks of flock(2) belong to an open file, so threads exclude each other like processes."""
    together, makers = Barrier(4), []

    def make(folder):
        with folder.with_suffix(".lock").open("w") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the others wait
        folder.mkdir()
        makers.append(folder)
        (folder / "file").write_text("whole")

    def ask(_):
        together.wait()
        return (shared.shared("once", make) / "file").read_text()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == ["whole"] * 4
    assert len(makers) == 1


def test_a_failure_is_repeated_and_leaves_nothing(session):
    def fail(folder):
        folder.mkdir()
        (folder / "half").touch()
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        shared.shared("twice", fail)
    folder = shared.shared("twice", lambda folder: folder.mkdir())
    assert list(folder.iterdir()) == []


def test_a_copy_is_ones_own(session, tmp_path):
    def make(folder):
        folder.mkdir()
        (folder / "file").write_text("shared")

    mine = tmp_path / "mine"
    shared.copy("original", make, mine)
    (mine / "file").write_text("changed")
    assert (shared.shared("original", make) / "file").read_text() == "shared"


def test_outside_of_a_session_it_is_made_where_it_is_wanted(monkeypatch, tmp_path):
    monkeypatch.setattr(shared, "_session", None)
    shared.copy("alone", lambda folder: folder.mkdir(), tmp_path / "there")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
