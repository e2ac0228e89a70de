"""Local storage: runs that lose ranks and nodes resume from it, bit for bit; contents of its staged files and nodes."""

import contextlib
import errno
import os
import re
import signal
import sys
import time

import pytest
import torch
import warm
from fault_matrix import TRAIN
from faults import environment as with_faults
from local_storage_worker import COPIED, look
from ports import free_port
from saver_worker import state
from tiny_run import environment, numbers, write_config
from typer.testing import CliRunner

from megamm import checkpoint
from megamm.checkpoint import inspect, manifest, reader, whole_tensors
from megamm.checkpoint.saver import Saver
from megamm.checkpoint.storage import local_files
from megamm.checkpoint.storage.local import LocalStorage
from megamm.checkpoint.tensor_shards import TensorShard
from megamm.cli import checkpoint as checkpoint_cli
from megamm.common import events
from megamm.common.device import choose
from megamm.common.errors import UserError
from megamm.elastic import heartbeat
from megamm.mcore import process_groups
from megamm.parity.worlds import WorldFailure

CHECKPOINT = {"every": 4, "keep": 9}
QUICK = {"backoff_seconds": 0, "same_step_limit": 9, "hang_seconds": 60}


class Run:
    """Commands on this machine, each with its own folder for local storage; output is written to a file."""

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
            self.commands.append(warm.start(command, env=env, stdout=log, stderr=log))

    def wait(self):
        codes = [command.wait(timeout=240) for command in self.commands]
        assert not any(codes), self.log()

    def log(self):
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.log")))

    def events(self, kind):
        return [event for event in events.read(self.output) if event["kind"] == kind]

    def steps(self, node, ranks):
        """Return the steps of which a node has the parts of these ranks."""
        found = {}
        for folder in (self.folder / node).glob("*/step_*"):
            found[manifest.step_of(folder.name)] = {part.rank for part in local_files.parts_in(folder)}
        return sorted(step for step, have in found.items() if have >= ranks)

    def until(self, what, seconds=120):
        """Wait until the condition is true."""
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
def data(undisturbed):
    return undisturbed


@pytest.fixture(scope="module")
def expected(data):
    return numbers(data / "baseline")


def test_a_killed_rank_costs_no_step(data, expected):
    """kill -9 in step 8, saved in the run's folder at step 4: the run resumes from step 7.

    A second kill while the last step is written there: resumed from local storage, the run has no step left to do.
    """
    run = Run(data, "killed", ">pause@step:8:0:0>sigkill@write:10:0:1", local="$NODE")
    try:
        run.start("a", "--nproc", "2")
        run.until((run.folder / "paused").exists)
        run.until(lambda: 7 in run.steps("a", {0, 1}))
        kept = run.steps("a", {0, 1})
        os.kill(rank(run, 1), signal.SIGKILL)
        run.wait()
    finally:
        run.kill()
    assert kept[-2:] == [6, 7], "the newest and the previous checkpoint are kept"
    resumed = [(event["tier"], event["step"]) for event in run.events("resumed")]
    assert resumed[0] == ("local", 7) and [tier for tier, _ in resumed] == ["local"] * 2
    checkpoint.verify(checkpoint.path_of(run.output, 10))
    assert numbers(run.output) == expected
    assert not list((run.folder / "a").glob("*/")), "a finished run uses no memory"


def test_nodes_that_are_lost(data, expected):
    """If one node loses its memory, its peer's replica is used; if both do, the run's folder."""
    run = Run(data, "nodes", ">pause@step:7:0:0>pause@step:10:0:1", local="$NODE")
    options = ["--nnodes", "2:2", "--rendezvous", f"127.0.0.1:{free_port()}"]
    options.append("resilience.rendezvous.last_call_timeout=1")
    try:
        for node in ("a", "b"):
            run.start(node, *options)
        found = []
        for newest, lost in ((6, "b"), (9, "ab")):
            run.until((run.folder / "paused").exists)
            with contextlib.suppress(TimeoutError):  # replicas may skip steps
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
    assert resumed == [("local", max(found[0])), ("run", 8)], run.log()
    assert numbers(run.output) == expected


def rank(run, number):
    """Return its process id."""
    return next(beat.pid for beat in heartbeat.read(run.output) if beat.rank == number)


FOUND = {
    "a node is lost": lambda rank: ([4, 5], [rank, (rank + 2) % 4]),
    "a copy is damaged": lambda rank: ([4, 5], [rank, (rank + 2) % 4]),
    "all copies are damaged": lambda rank: (
        [4, 5],
        "damaged checkpoint: no node has a valid tensors/__0_0.distcp of step 5",
    ),
    "a part is missing": lambda rank: ([4], [rank, (rank + 2) % 4]),
    "another run": lambda rank: ([], []),
    COPIED: lambda rank: ([], []),
}


@pytest.mark.parametrize("how", FOUND)
def test_what_the_nodes_together_have(worlds, tmp_path, how):
    """Four ranks on two nodes; a rank reads its own shard and that of a rank on the other node."""
    (tmp_path / "run").mkdir()
    found = worlds.run(4, look, (str(tmp_path), how), timeout=100)
    assert not isinstance(found, WorldFailure), found.lines()
    for number, (steps, shards) in enumerate(found):
        want_steps, want = FOUND[how](number)
        assert (steps[-len(want_steps) :] if want_steps else steps, shards) == (want_steps, want)


@pytest.fixture
def one_rank(tmp_path):
    """Return a saver with local storage, and that."""
    process_groups.start(choose("cpu"))
    (tmp_path / "run").mkdir()
    local = LocalStorage(str(tmp_path / "node"), tmp_path / "run", replicate=True)
    local.begin(-1)
    saver = Saver(tmp_path / "run", choose("cpu"), keep=9, local=local)
    yield saver, local
    saver.close()
    local.close()


def save(saver, data, step, to_run=False):
    data.fill_(step)
    saver.save(state(step), [TensorShard.whole("a", data)], {"torch": torch.get_rng_state()}, to_run=to_run)
    saver.settle()


def kept(local):
    """Return the steps with a valid part; each must always be complete, with the values of its step."""
    found = []
    for step in local_files.steps_in(local.root):
        folder = local_files.folder_of(local.root, step)
        for part in local_files.parts_in(folder):
            assert all(manifest.is_whole(folder / name, entry) for name, entry in part.files.items()), (step, found)
            data = torch.zeros(1000)
            reader.load(folder / "tensors", [TensorShard.whole("a", data)])
            assert data.unique().tolist() == [step]
            found.append(step)
    return found


def test_staged_files_take_turns(one_rank):
    saver, local = one_rank
    data = torch.zeros(1000)
    for step in range(1, 8):
        save(saver, data, step)
        assert kept(local)[: min(step - 1, 2)] == list(range(max(1, step - 2), step)), "before it is written"
        saver.finish()
        assert kept(local) == list(range(max(1, step - 2), step + 1))
    assert len(list((local.root / local_files.STAGED).iterdir())) == 3
    saver.forget()
    local.begin(-1)
    assert kept(local) == []
    save(saver, data, 2)
    saver.finish()
    assert kept(local) == [2]


def test_what_a_node_has_is_listed(one_rank, tmp_path):
    """Complete, damaged, and with one rank of two; the tools list them like the run's folder and prune none of them."""
    saver, local = one_rank
    for step in (1, 2):
        save(saver, torch.zeros(1000), step, to_run=step == 1)
        saver.finish()
    two = local_files.folder_of(local.root, 2)

    def listed(place):
        done = CliRunner().invoke(checkpoint_cli.app, ["list", str(place)])
        assert done.exit_code == 0, done.output
        columns = [re.split("  +", line.strip()) for line in done.stdout.splitlines()]
        return [[step, *told] for step, _, _, *told, _ in columns]

    run, step_1, step_2 = ["1", "run", "valid"], ["1", "local", "valid"], ["2", "local", "valid", "newest"]
    assert listed(tmp_path / "run") == [run, step_1, step_2]
    assert listed(local.root) == [step_1, step_2] and listed(two) == [step_2]
    assert inspect.find_one(str(two)).damage() == "" and list(whole_tensors.described(two))
    with pytest.raises(UserError, match="prune does not change local storage"):
        checkpoint_cli.prune(str(local.root), keep=1, delete=True)
    (part,) = local_files.parts_in(two)
    local_files.commit(two, local_files.PartRecord(part.rank, 2, part.save, part.node, part.files))
    assert listed(local.root)[1][1:] == ["local", "damaged: this node has only parts of ranks 0 of 2", "newest"]
    local_files.commit(two, part)
    image = two / "tensors" / "__0_0.distcp"
    data = bytearray(image.read_bytes())
    data[-1] ^= 1
    image.write_bytes(data)
    assert inspect.find_one(str(two)).damage() == "tensors/__0_0.distcp fails its checksum"


def test_a_slow_disk_holds_up_no_local_step(one_rank, tmp_path):
    """In the run's folder the file is a pipe that is read after five more local steps: it must contain its own step."""
    saver, local = one_rank
    data = torch.zeros(1000)
    save(saver, data, 1)
    saver.finish()
    temporary = f".tmp-step_00000002-{saver.nonce}-{saver.saves + 1:06d}"
    pipe = tmp_path / "run" / "checkpoints" / temporary / "tensors" / "__0_0.distcp"
    pipe.parent.mkdir(parents=True)
    os.mkfifo(pipe)
    save(saver, data, 2, to_run=True)
    for step in range(3, 8):
        save(saver, data, step)
        while saver.pending.awaits("saved_locally"):
            saver.pending.wait()
        assert step in kept(local) and saver.pending.awaits("written")
    wanted, written = torch.full((1000,), 2.0).numpy().tobytes(), b""
    # "r+": the writer first tries O_DIRECT, which would close a pipe that is only read.
    with pipe.open("r+b", buffering=0) as opened:
        while wanted not in written:
            written += opened.read(1 << 20)
    while saver.pending.answers:
        saver.pending.wait()
    assert saver.pending.failures == 1, "a pipe cannot be synced"


def test_no_space_is_one_line(one_rank, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    saver, _ = one_rank
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"No space left.*3 times [0-9,]+ bytes"):
        save(saver, torch.zeros(1000), 1)
