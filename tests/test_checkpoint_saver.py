"""A rank's saves: how long a step waits, what a checkpoint contains, and how a run handles failing writers."""

import json
import os
import signal
import threading
import time
from dataclasses import replace

import psutil
import pytest
import torch
from saver_worker import Trouble, run, state

from megamm import checkpoint
from megamm.checkpoint import reader
from megamm.checkpoint.saver import FAILURES, Saver
from megamm.checkpoint.tensor_shards import TensorShard
from megamm.common import events
from megamm.common.device import choose
from megamm.common.errors import UserError
from megamm.mcore import process_groups
from megamm.parity.worlds import WorldFailure

RNG = {"torch": torch.arange(9, dtype=torch.uint8)}


@pytest.fixture
def saver(tmp_path):
    process_groups.start(choose("cpu"))
    saver = Saver(tmp_path, choose("cpu"), keep=2)
    yield saver
    saver.close()


def _stored(run, step: int) -> list[float]:
    data = torch.zeros(1000)
    reader.load(checkpoint.path_of(run, step) / "tensors", [TensorShard.whole("a", data)])
    return data.unique().tolist()


def test_a_checkpoint_holds_the_state_of_its_step(saver, tmp_path):
    """The writer sleeps while the tensors change: it has the old values; the next save waits and takes no memory."""
    data = torch.zeros(1000)
    blocks = [TensorShard.whole("a", data)]
    saver.save(state(0), blocks, RNG, wait=True)
    os.kill(saver.pending.process.process.pid, signal.SIGSTOP)
    data.fill_(1)
    start = time.monotonic()
    saver.save(state(1), blocks, RNG)
    assert time.monotonic() - start < 5
    data.fill_(2)
    before, threads = psutil.Process().memory_full_info(), []
    threads.append(threading.Timer(0.3, os.kill, [saver.pending.process.process.pid, signal.SIGCONT]))
    threads[0].start()
    assert saver.poll()[0].folder.name == "step_00000000" and saver.poll() == []
    start = time.monotonic()
    saver.save(state(2), blocks, RNG)
    seconds = time.monotonic() - start
    data.fill_(3)
    saver.finish()
    assert psutil.Process().memory_full_info().shared - before.shared < 1 << 20
    assert [_stored(tmp_path, step) for step in (1, 2)] == [[1.0], [2.0]]
    assert [done.folder.name for done in saver.poll()] == ["step_00000001", "step_00000002"]
    assert not checkpoint.path_of(tmp_path, 0).exists(), "two checkpoints are kept"
    assert torch.equal(checkpoint.read_rng(checkpoint.path_of(tmp_path, 2), 0)["torch"], RNG["torch"])
    saved = events.read(tmp_path)
    assert [event["step"] for event in saved] == [0, 1, 2]
    assert 0.2 < saved[2]["stall"] <= seconds, "back-pressure counts to the stall"


def test_steady_blocks_are_copied_while_the_run_goes_on(saver, tmp_path, monkeypatch):
    """The copy is delayed until the run asks whether it may change them; later changes are not stored."""
    data, moved = torch.zeros(1000), torch.zeros(1000)
    blocks = [TensorShard("a", (1000,), (0,), (1000,), data, steady=True), TensorShard.whole("b", moved)]
    saver.save(state(0), blocks, RNG, wait=True)
    asked, copy = threading.Event(), saver.staged.copy

    def held_up(blocks, steady):
        assert not steady or asked.wait(30)
        copy(blocks, steady)

    monkeypatch.setattr(saver.staged, "copy", held_up)
    data.fill_(1)
    moved.fill_(1)
    saver.save(state(1), blocks, RNG)
    moved.fill_(7)  # not steady: it was already copied
    assert saver.poll()[0].folder.name == "step_00000000" and saver.poll() == []
    asked.set()
    saver.settle()
    data.fill_(7)
    saver.finish()
    other = torch.zeros(1000)
    reader.load(checkpoint.path_of(tmp_path, 1) / "tensors", [TensorShard.whole("b", other)])
    assert _stored(tmp_path, 1) == other.unique().tolist() == [1.0]


def test_one_failure_is_told_and_left_out(saver, tmp_path, caplog):
    data = torch.zeros(1000)
    saver.save(state(0), [TensorShard.whole("a", data)], RNG, wait=True)
    for step in range(1, 2 * FAILURES, 2):
        os.kill(saver.pending.process.process.pid, signal.SIGKILL)
        saver.pending.process.process.wait()
        saver.save(state(step), [TensorShard.whole("a", data)], RNG)
        saver.save(state(step + 1), [TensorShard.whole("a", data)], RNG, wait=True)
    assert checkpoint.newest(tmp_path) == checkpoint.path_of(tmp_path, 2 * FAILURES)
    assert (
        caplog.text.count("a checkpoint could not be written (1 in a row): the writer process ended with signal 9") == 3
    )
    assert [event["step"] for event in events.read(tmp_path) if event["kind"] == "save_failed"] == [1, 3, 5]


def test_failures_in_a_row_stop_the_run(saver, tmp_path):
    data = torch.zeros(1000)
    saver.save(state(1), [TensorShard.whole("a", data)], RNG, wait=True)
    with pytest.raises(UserError, match="could not be written: the writer process ended with signal 9"):
        for step in range(2, 3 + FAILURES):
            saver.save(state(step), [TensorShard.whole("a", data)], RNG)
            saver.pending.process.process.kill()
            saver.pending.process.process.wait()
            saver.poll()
    assert step == 2 + FAILURES, "at the save after the last failure"
    assert checkpoint.newest(tmp_path) is not None


def test_the_save_that_is_waited_for_must_be_there(saver, tmp_path):
    """There is a file at the path of the checkpoint folder."""
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match=r"could not be written: .*Errno"):
        saver.save(state(1), [TensorShard.whole("a", torch.zeros(9))], RNG, wait=True)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_of_two_loses_its_writer(worlds, tmp_path, rank):
    """The other ranks learn of it from its rank; no run hangs, and the next save is complete."""
    done = worlds.run(2, run, Trouble(tmp_path, rank, kills=(3,), steps=5), timeout=60)
    assert not isinstance(done, WorldFailure), done.lines()
    assert [error for error, _ in done] == ["", ""]
    assert done[0][1] == [1, 2, 4, 5] and done[1][1] == []
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*")) == [
        f"step_{step:08d}" for step in (1, 2, 4, 5)
    ]
    for step in (1, 2, 4, 5):
        checkpoint.verify(checkpoint.path_of(tmp_path, step))
        data = torch.zeros(8)
        reader.load(checkpoint.path_of(tmp_path, step) / "tensors", [TensorShard.whole("a", data)])
        assert data.tolist() == [float(step)] * 8


def test_all_ranks_stop_together(worlds, tmp_path):
    done = worlds.run(2, run, Trouble(tmp_path, 1, kills=(2, 3, 4), steps=9), timeout=60)
    assert not isinstance(done, WorldFailure), done.lines()
    assert done[0][0] == done[1][0] and "rank 1: the writer process ended with signal 9" in done[0][0]
    assert done[0][1] == [1]


def test_state_is_read_back_and_holds_no_secrets(tmp_path):
    config = {"checkpoint": {"remote": "s3://me:hidden@host/bucket/run?token=hidden"}, "list": ["http://a@b/c"]}
    whole = replace(checkpoint_state(), config=config, tokens={"text": 5}, loss_guard={"skipped": [3]})
    (tmp_path / "state.json").write_bytes(whole.to_json())
    read = checkpoint.read_state(tmp_path)
    assert read.config == {"checkpoint": {"remote": "s3://***@host/bucket/run?***"}, "list": ["http://***@b/c"]}
    assert replace(read, config=config) == whole
    old = json.loads(whole.to_json())
    for name in ("tokens", "loss_guard", "mixture"):
        del old[name]
    (tmp_path / "state.json").write_text(json.dumps(old))
    assert checkpoint.read_state(tmp_path).tokens == {}


def checkpoint_state() -> checkpoint.TrainState:
    return checkpoint.TrainState(
        3, 12, 1, layout={}, vocabulary=[], config={}, versions={"code": checkpoint.code_version()}
    )
