"""The nodes' protocol of local storage under attack, and the records of what a rank wrote."""

import shutil
import socket

import pytest

from megamm.checkpoint import manifest
from megamm.checkpoint.manifest import ManifestEntry
from megamm.checkpoint.storage import local_files, peer

KEY = bytes(range(32))
SHARD = "tensors/__0_0.distcp"


@pytest.fixture
def node(tmp_path):
    """Return a server over a folder with one part: (server, address, part, a secret file next to the folder)."""
    root = tmp_path / "root"
    folder = local_files.folder_of(root, 3)
    (folder / "tensors").mkdir(parents=True)
    (folder / SHARD).write_bytes(b"x" * 9)
    part = local_files.PartRecord(0, 1, "save", "me", {SHARD: manifest.digest(folder / SHARD)})
    local_files.commit(folder, part)
    (tmp_path / "secret").write_bytes(b"secret")
    server = peer.Server(root, KEY, "127.0.0.1")
    return server, ("127.0.0.1", server.port), part, tmp_path / "secret"


def test_wire_needs_the_key(node, tmp_path):
    server, address, part, _ = node
    peer.get(address, KEY, 3, SHARD, part.files[SHARD], tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == b"x" * 9
    with pytest.raises(peer.WireError):
        peer.get(address, b"wrong", 3, SHARD, part.files[SHARD], tmp_path / "refused")
    with pytest.raises(peer.WireError):
        peer.put(address, b"wrong", server.root, 3, 0, floor=0)
    assert not (tmp_path / "refused").exists()


def test_wire_stays_in_its_folder_both_ways(node, tmp_path):
    server, address, _part, secret = node
    with pytest.raises(peer.WireError):
        peer.get(address, KEY, 3, "../../secret", manifest.digest(secret), tmp_path / "stolen")
    assert not (tmp_path / "stolen").exists()
    source = local_files.folder_of(tmp_path / "source", 4)
    source.mkdir(parents=True)
    (source.parent / "evil").write_bytes(b"evil")
    local_files.commit(
        source, local_files.PartRecord(0, 1, "save", "me", {"../evil": manifest.digest(source.parent / "evil")})
    )
    with pytest.raises(peer.WireError):
        peer.put(address, KEY, source.parent, 4, 0, floor=0)
    assert not list(server.root.rglob("*evil*"))


def test_a_silent_client_keeps_nobody_waiting(node, tmp_path):
    _, address, part, _ = node
    with socket.create_connection(address):
        peer.get(address, KEY, 3, SHARD, part.files[SHARD], tmp_path / "got")
    assert (tmp_path / "got").exists()


def test_a_wrong_file_is_not_taken(node, tmp_path):
    _, address, _part, _ = node
    with pytest.raises(peer.WireError, match="checksum"):
        peer.get(address, KEY, 3, SHARD, ManifestEntry(9, "0" * 32), tmp_path / "got")
    assert list(tmp_path.glob("*got*")) == []


def test_replicas_replace_older_ones(node, tmp_path):
    """Parts that the sender reports as replicated everywhere are removed; parts of other ranks and nodes stay."""
    server, address, part, _ = node
    theirs = local_files.PartRecord(1, 1, "save", "other", {})
    local_files.commit(local_files.folder_of(server.root, 3), theirs)
    source = tmp_path / "source"
    for step in (4, 5):
        shutil.copytree(local_files.folder_of(server.root, 3), local_files.folder_of(source, step))
    for step in (4, 5):
        peer.put(address, KEY, source, step, 0, floor=4)
    steps = {
        step: local_files.parts_in(local_files.folder_of(server.root, step))
        for step in local_files.steps_in(server.root)
    }
    assert steps == {3: [theirs], 4: [part], 5: [part]}


def test_part_records_are_checked():
    good = local_files.PartRecord(0, 2, "save", "me", {"rng_00000.safetensors": ManifestEntry(1, "0" * 32)}).to_json()
    assert local_files.PartRecord.from_json(good).to_json() == good
    for name in ("../x", "/etc/passwd", "a/../../x", "a\\..\\x", ""):
        with pytest.raises(ValueError, match="lists"):
            local_files.PartRecord.from_json(good | {"files": {name: {"size": 1, "xxh3_128": ""}}})
    for bad in ({}, [], good | {"files": 3}, good | {"rank": None}):
        with pytest.raises(ValueError, match="not a part"):
            local_files.PartRecord.from_json(bad)
