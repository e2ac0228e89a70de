"""Saves by real ranks (megamm/parity/worlds.py) of which one has a fault, for test_checkpoint_saver.py."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megamm import checkpoint
from megamm.checkpoint.saver import Saver
from megamm.checkpoint.tensor_shards import TensorShard
from megamm.common.device import choose
from megamm.common.errors import UserError


@dataclass(frozen=True)
class Trouble:
    """At each save of `kills` this rank's writer is killed before it has read its job."""

    run: Path
    rank: int
    kills: tuple[int, ...]
    steps: int


def state(step: int) -> checkpoint.TrainState:
    """Return the state for a checkpoint of which only the tensors are used."""
    return checkpoint.TrainState(step, 0, dist.get_world_size(), layout={}, vocabulary=[], config={}, versions={})


def run(trouble: Trouble) -> tuple[str, list[int]]:
    """Return the error that stopped the rank, or "", and the steps of checkpoints that it knows to be complete."""
    rank, world = dist.get_rank(), dist.get_world_size()
    data, complete = torch.zeros(4), []
    blocks = [TensorShard("a", (4 * world,), (4 * rank,), (4,), data)]
    saver = Saver(trouble.run, choose("cpu"), keep=9)
    try:
        for step in range(1, trouble.steps + 1):
            if rank == trouble.rank and step in trouble.kills:
                saver.settle()
                while saver.pending.answers:
                    saver.pending.wait()
                os.kill(saver._process().process.pid, signal.SIGSTOP)
            data.fill_(step)
            saver.save(state(step), blocks, {"torch": torch.get_rng_state()})
            if rank == trouble.rank and step in trouble.kills:
                assert saver.pending.process is not None
                os.kill(saver.pending.process.process.pid, signal.SIGKILL)
            complete += [int(done.folder.name[5:]) for done in saver.poll()]
        saver.finish()
        complete += [int(done.folder.name[5:]) for done in saver.poll()]
    except UserError as error:
        return str(error), complete
    finally:
        saver.close()
    return "", complete
