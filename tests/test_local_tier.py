"""The local tier with four real processes on two simulated nodes; its wire between nodes under attack."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megamm.errors import UserError
from megamm.resilience import events
from megamm.tiers import manifest, parts, wire
from megamm.tiers.peer import Counter, Keeper, Settings

WORKER = Path(__file__).with_name("local_tier_worker.py")
KEY = bytes(range(32))


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """All scenarios, by one start of the processes; (results, folder)."""
    folder = tmp_path_factory.mktemp("job")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    common = os.environ | {"WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{WORKER.parents[1]}:{WORKER.parent}", "AWS_REGION": "us-east-1"}
    common |= {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "no-such-secret"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(folder)],
            env=common | {"RANK": str(rank), "NODE": f"n{rank // 2}"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    try:
        errors = [process.communicate(timeout=240)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0] * 4, "\n".join(errors)
    return json.loads((folder / "results.json").read_text()), folder


SEEN_BY_EACH = {
    "old_steps_go_and_the_newest_is_found": lambda rank: [[4, 5], [rank]],
    "a_lost_node_gets_its_files_from_its_peer": lambda rank: [[4, 5], [rank]],
    "a_changed_layout_gets_what_it_needs": lambda rank: True,
    "a_damaged_copy_is_replaced_by_the_replica": lambda rank: [[4, 5], [0, rank]],
    "what_no_node_has_whole_is_passed_over": lambda rank: [4, "local", True, [4]],
    "without_replicas_a_lost_node_is_lost": lambda rank: [[1, 2], []],
    "a_step_that_lacks_one_rank_does_not_count": lambda rank: [1, 2],
    "another_runs_steps_do_not_count": lambda rank: [],
    "the_newest_over_all_tiers_is_chosen": lambda rank: [
        [3, "run", "step_00000003"],
        [3, "durable", "step_00000003"],
        [2, "local", "step_00000002"],
        [2, "durable", "step_00000002"],
    ],
    "a_durable_tier_out_of_reach": lambda rank: ["run", "cannot list it"],
}


@pytest.mark.parametrize("scenario", SEEN_BY_EACH)
def test_local_tier(job, scenario):
    results, _ = job
    assert results[scenario] == [SEEN_BY_EACH[scenario](rank) for rank in range(4)]


def test_what_was_passed_over_is_told(job):
    _, folder = job
    told = [(e["tier"], e["folder"], e["why"]) for e in events.read(folder / "a" / "run")]
    assert [(tier, name) for tier, name, _ in told] == [("local", "step_00000005")]
    assert "__2_0.distcp of step 5" in told[0][2]
    told = [(e["tier"], e["folder"]) for e in events.read(folder / "d" / "run")]
    assert told == [("run", "step_00000003")]
    assert (folder / "d" / "run" / "checkpoints" / "step_00000002").is_dir()
    told = [e["tier"] for e in events.read(folder / "e" / "run")]
    assert told == ["durable"]


@pytest.fixture
def node(tmp_path):
    """A node's server over a folder that holds one part; (server, address, part, a secret file beside the folder)."""
    root = tmp_path / "root"
    folder = parts.begin(root, 3, 0)
    (folder / "tensors" / "__0_0.distcp").write_bytes(b"x" * 9)
    entry = manifest.digest(folder / "tensors" / "__0_0.distcp")
    part = parts.Part(0, 1, "save", "me", {"tensors/__0_0.distcp": entry})
    parts.commit(folder, part)
    (tmp_path / "secret").write_bytes(b"secret")
    server = wire.Server(root, KEY, "127.0.0.1", Counter().told)
    return server, ("127.0.0.1", server.port), part, tmp_path / "secret"


def test_wire_needs_the_key(node, tmp_path):
    _, address, part, _ = node
    entry = part.files["tensors/__0_0.distcp"]
    wire.get(address, KEY, 3, "tensors/__0_0.distcp", entry, tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == b"x" * 9
    with pytest.raises(wire.WireError):
        wire.get(address, b"wrong", 3, "tensors/__0_0.distcp", entry, tmp_path / "refused")
    with pytest.raises(wire.WireError):
        wire.ask(address, b"wrong", {"do": "have", "node": "x", "steps": [], "nodes": 1})
    assert not (tmp_path / "refused").exists()


def test_wire_stays_in_its_folder_both_ways(node, tmp_path):
    server, address, _part, secret = node
    with pytest.raises(wire.WireError):
        wire.get(address, KEY, 3, "../../secret", manifest.digest(secret), tmp_path / "stolen")
    assert not (tmp_path / "stolen").exists()
    source = tmp_path / "source"
    (source / "step_00000004").mkdir(parents=True)
    (source / "evil").write_bytes(b"evil")
    evil = parts.Part(0, 1, "save", "me", {"../evil": manifest.digest(source / "evil")})
    with pytest.raises(wire.WireError):
        wire.put(address, KEY, source, 4, evil)
    assert not (server.root / "evil").exists() and not list(server.root.rglob("*evil*"))


def test_a_silent_client_keeps_nobody_waiting(node, tmp_path):
    _, address, part, _ = node
    with socket.create_connection(address):
        name = "tensors/__0_0.distcp"
        wire.get(address, KEY, 3, name, part.files[name], tmp_path / "got")
    assert (tmp_path / "got").exists()


def test_a_wrong_file_is_not_taken(node, tmp_path):
    _, address, _part, _ = node
    name = "tensors/__0_0.distcp"
    with pytest.raises(wire.WireError, match="checksum"):
        wire.get(address, KEY, 3, name, manifest.Entry(9, "0" * 64), tmp_path / "got")
    assert list(tmp_path.glob("*got*")) == []


def test_memory_is_bounded_when_the_peer_is_away(node, caplog):
    """No replica arrives anywhere: the oldest steps go all the same, and it is said."""
    server, address, part, _ = node
    with socket.create_server(("127.0.0.1", 0)) as away:
        nowhere = away.getsockname()
    settings = Settings("me", ["me", "you"], {"me": address, "you": nowhere}, [0], "save", 2, True)
    keeper = Keeper(server.root, KEY, settings)
    for step in range(4, 12):
        folder = parts.begin(server.root, step, 0)
        (folder / "tensors" / "__0_0.distcp").write_bytes(b"x" * 9)
        parts.commit(folder, part)
        keeper.once()
    assert parts.steps_in(server.root) == [8, 9, 10, 11]
    assert "raise checkpoint.local_every" in caplog.text and caplog.text.count("replica of step") == 1


def test_part_records_are_checked():
    good = parts.Part(0, 2, "save", "me", {"rng_00000.safetensors": manifest.Entry(1, "0" * 64)}).to_json()
    assert parts.Part.from_json(good).to_json() == good
    for name in ("../x", "/etc/passwd", "a/../../x", "a\\..\\x", ""):
        with pytest.raises(ValueError, match="lists"):
            parts.Part.from_json(good | {"files": {name: {"size": 1, "sha256": ""}}})
    for bad in ({}, [], good | {"files": 3}, good | {"rank": None}):
        with pytest.raises(ValueError, match="not a part"):
            parts.Part.from_json(bad)


def test_manifest_names_stay_inside():
    state = {"size": 1, "sha256": ""}
    for name in ("../../x", "/x", "a/../../x", "manifest.json", "a//b"):
        data = json.dumps({"files": {"state.json": state, name: state}}).encode()
        with pytest.raises(UserError, match="which is not a file of a checkpoint"):
            manifest.parse(data, "here")
