"""The local tier: runs that lose ranks and nodes go on from it, bit for bit; its wire between nodes under attack."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from faults import environment as with_faults
from tiny_run import environment, make_data, numbers, write_config

from megamm.checkpoint import manifest
from megamm.checkpoint.manifest import Entry
from megamm.resilience import events, heartbeat
from megamm.tiers import parts, wire

TRAIN = {"steps": 14, "global_batch": 4, "micro_batch": 1, "log_every": 1}
CHECKPOINT = {"every": 5, "keep": 9}
QUICK = {"backoff_seconds": 0, "same_step_limit": 9, "hang_seconds": 60}
KEY = bytes(range(32))
SHARD = "tensors/__0_0.distcp"


class Run:
    """Commands on this machine, each with a folder of its own for the local tier; output goes to a file."""

    def __init__(self, data, name, faults="", **checkpoint):
        self.output, self.folder = data / name, data / f"{name}.nodes"
        sections = {"train": TRAIN, "checkpoint": CHECKPOINT | checkpoint, "resilience": QUICK}
        self.config = write_config(data, self.output, **sections)
        self.folder.mkdir()
        self.env = with_faults(faults, environment(), self.folder) if faults else environment()
        self.commands = []

    def start(self, node, *options):
        command = [sys.executable, "-m", "megamm", "train", str(self.config), *options]
        with (self.folder / f"{node}.log").open("w") as log:
            env = self.env | {"NODE": str(self.folder / node)}
            self.commands.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))

    def wait(self):
        codes = [command.wait(timeout=240) for command in self.commands]
        assert not any(codes), self.log()

    def log(self):
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.log")))

    def events(self, kind):
        return [event for event in events.read(self.output) if event["kind"] == kind]

    def steps(self, node, ranks):
        """Steps of which a node has these ranks' parts."""
        found = {}
        for folder in (self.folder / node).glob("*/step_*"):
            found[manifest.step_of(folder.name)] = {part.rank for part in parts.parts_in(folder)}
        return sorted(step for step, have in found.items() if have >= ranks)

    def until(self, what, seconds=120):
        """Wait until it is true."""
        end = time.monotonic() + seconds
        while not what():
            assert all(command.poll() is None for command in self.commands), self.log()
            if time.monotonic() > end:
                raise TimeoutError(self.log())
            time.sleep(0.02)

    def kill(self):
        for command in self.commands:
            command.kill()
            command.wait()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(data):
    run = Run(data, "undisturbed")
    run.start("a", "--nproc", "2")
    run.wait()
    return numbers(run.output)


def test_a_killed_rank_costs_no_step(data, undisturbed):
    """kill -9 in step 9, saved in the run's folder at step 5: the run goes on from step 8."""
    run = Run(data, "killed", ">pause@step:9:0:0", local="$NODE")
    try:
        run.start("a", "--nproc", "2")
        run.until((run.folder / "paused").exists)
        run.until(lambda: 8 in run.steps("a", {0, 1}))
        kept = run.steps("a", {0, 1})
        os.kill(rank(run, 1), signal.SIGKILL)
        run.wait()
    finally:
        run.kill()
    assert kept[-2:] == [7, 8], "the newest is kept, and one to go back to"
    (resumed,) = run.events("resumed")
    assert (resumed["tier"], resumed["step"]) == ("local", 8)
    assert numbers(run.output) == undisturbed
    assert not list((run.folder / "a").glob("*/")), "a run that is done takes no memory"


def test_nodes_that_are_lost(data, undisturbed):
    """One node's memory is lost: its peer's replica serves. Both are: the run's folder."""
    run = Run(data, "nodes", ">pause@step:9:0:0>pause@step:12:0:1", local="$NODE")
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"127.0.0.1:{server.getsockname()[1]}"
    options = ["--nnodes", "2:2", "--rendezvous", endpoint, "resilience.rendezvous.last_call=1"]
    try:
        for node in ("a", "b"):
            run.start(node, *options)
        found = []
        for newest, lost in ((8, "b"), (11, "ab")):
            run.until((run.folder / "paused").exists)
            with contextlib.suppress(TimeoutError):  # replicas may leave out steps
                run.until(lambda step=newest: all(step in run.steps(node, {0, 1}) for node in "ab"), seconds=10)
            found.append(run.steps("a", {0, 1}))
            for node in lost:
                (run.folder / node).rename(run.folder / f"lost-{node}-{newest}")
            os.kill(rank(run, 1), signal.SIGKILL)
            (run.folder / "paused").unlink()
        run.wait()
    finally:
        run.kill()
    resumed = [(event["tier"], event["step"]) for event in run.events("resumed")]
    assert resumed == [("local", max(found[0])), ("run", 10)], run.log()
    assert numbers(run.output) == undisturbed


def rank(run, number):
    """Its process."""
    return next(beat.pid for beat in heartbeat.read(run.output) if beat.rank == number)


@pytest.fixture
def node(tmp_path):
    """A node's server over a folder that holds one part; (server, address, part, a secret file beside the folder)."""
    root = tmp_path / "root"
    folder = parts.folder_of(root, 3)
    (folder / "tensors").mkdir(parents=True)
    (folder / SHARD).write_bytes(b"x" * 9)
    part = parts.Part(0, 1, "save", "me", {SHARD: manifest.digest(folder / SHARD)})
    parts.commit(folder, part)
    (tmp_path / "secret").write_bytes(b"secret")
    server = wire.Server(root, KEY, "127.0.0.1")
    return server, ("127.0.0.1", server.port), part, tmp_path / "secret"


def test_wire_needs_the_key(node, tmp_path):
    server, address, part, _ = node
    wire.get(address, KEY, 3, SHARD, part.files[SHARD], tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == b"x" * 9
    with pytest.raises(wire.WireError):
        wire.get(address, b"wrong", 3, SHARD, part.files[SHARD], tmp_path / "refused")
    with pytest.raises(wire.WireError):
        wire.put(address, b"wrong", server.root, 3, 0, floor=0)
    assert not (tmp_path / "refused").exists()


def test_wire_stays_in_its_folder_both_ways(node, tmp_path):
    server, address, _part, secret = node
    with pytest.raises(wire.WireError):
        wire.get(address, KEY, 3, "../../secret", manifest.digest(secret), tmp_path / "stolen")
    assert not (tmp_path / "stolen").exists()
    source = parts.folder_of(tmp_path / "source", 4)
    source.mkdir(parents=True)
    (source.parent / "evil").write_bytes(b"evil")
    parts.commit(source, parts.Part(0, 1, "save", "me", {"../evil": manifest.digest(source.parent / "evil")}))
    with pytest.raises(wire.WireError):
        wire.put(address, KEY, source.parent, 4, 0, floor=0)
    assert not list(server.root.rglob("*evil*"))


def test_a_silent_client_keeps_nobody_waiting(node, tmp_path):
    _, address, part, _ = node
    with socket.create_connection(address):
        wire.get(address, KEY, 3, SHARD, part.files[SHARD], tmp_path / "got")
    assert (tmp_path / "got").exists()


def test_a_wrong_file_is_not_taken(node, tmp_path):
    _, address, _part, _ = node
    with pytest.raises(wire.WireError, match="checksum"):
        wire.get(address, KEY, 3, SHARD, Entry(9, "0" * 32), tmp_path / "got")
    assert list(tmp_path.glob("*got*")) == []


def test_replicas_replace_older_ones(node, tmp_path):
    """What the sender says is replicated everywhere makes room for; parts of other ranks and nodes stay."""
    server, address, part, _ = node
    theirs = parts.Part(1, 1, "save", "other", {})
    parts.commit(parts.folder_of(server.root, 3), theirs)
    source = tmp_path / "source"
    for step in (4, 5):
        shutil.copytree(parts.folder_of(server.root, 3), parts.folder_of(source, step))
    for step in (4, 5):
        wire.put(address, KEY, source, step, 0, floor=4)
    steps = {step: parts.parts_in(parts.folder_of(server.root, step)) for step in parts.steps_in(server.root)}
    assert steps == {3: [theirs], 4: [part], 5: [part]}


def test_part_records_are_checked():
    good = parts.Part(0, 2, "save", "me", {"rng_00000.safetensors": Entry(1, "0" * 32)}).to_json()
    assert parts.Part.from_json(good).to_json() == good
    for name in ("../x", "/etc/passwd", "a/../../x", "a\\..\\x", ""):
        with pytest.raises(ValueError, match="lists"):
            parts.Part.from_json(good | {"files": {name: {"size": 1, "xxh3_128": ""}}})
    for bad in ({}, [], good | {"files": 3}, good | {"rank": None}):
        with pytest.raises(ValueError, match="not a part"):
            parts.Part.from_json(bad)
