"""Ranks of two nodes (megamm/parity/worlds.py) that save into local storage and search it (test_local_storage.py).

A node is a folder; another `LocalStorage` object is another attempt of the job.
"""

import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from saver_worker import state

from megamm.checkpoint.saver import Saver
from megamm.checkpoint.storage.local import LocalStorage
from megamm.checkpoint.tensor_shards import TensorShard
from megamm.common.device import choose
from megamm.common.errors import UserError

STEPS = 5
COPIED = "a copy of the run"


def shard(rank):
    return f"tensors/__{rank}_0.distcp"


def tier(folder, run="run"):
    os.environ["NODE"] = f"n{2 * dist.get_rank() // dist.get_world_size()}"
    os.environ["MASTER_ADDR"] = "127.0.0.1"  # as set by every launcher
    return LocalStorage(f"{folder}/$NODE", folder / run, replicate=True)


def save(folder):
    """Run steps, each saved and replicated."""
    local = tier(folder)
    local.begin(-1)
    rank, world = dist.get_rank(), dist.get_world_size()
    saver, data = Saver(folder / "run", choose("cpu"), keep=1, local=local), torch.zeros(999 + rank)
    blocks = [TensorShard(f"a{r}", (999 + r,), (0,), (999 + r,), data) for r in range(world) if r == rank]
    try:
        for step in range(1, STEPS + 1):
            data.fill_(step)
            saver.save(state(step), blocks, {"torch": torch.get_rng_state()}, to_run=False)
            saver.finish()
            while saver.pending.answers:
                saver.pending.wait()
    finally:
        saver.close()
        dist.barrier()
        local.close()


def hurt(folder, how):
    """Damage the folders, on rank 0."""
    newest = f"*/step_{STEPS:08d}"
    if how == "a node is lost":
        shutil.rmtree(folder / "n1")
    for node in {"a copy is damaged": ["n0"], "all copies are damaged": ["n0", "n1"]}.get(how, []):
        (path,) = (folder / node).glob(f"{newest}/{shard(0)}")
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    if how == "a part is missing":
        for path in folder.glob(f"n?/{newest}/part_00002.json"):
            path.unlink()
    if how == "another run":
        (folder / "run" / "run_id").unlink()
    if how == COPIED:
        shutil.copytree(folder / "run", folder / COPIED)


def look(told):
    """Return, after `how`, the steps found and the ranks whose shards of the newest step are here and correct."""
    folder, how = Path(told[0]), told[1]
    save(folder)
    if dist.get_rank() == 0:
        hurt(folder, how)
    dist.barrier()
    local = tier(folder, COPIED if how == COPIED else "run")
    try:
        steps = local.steps()
        if not steps:
            return steps, []
        # Read as a rank of another layout would.
        wanted = [dist.get_rank(), (dist.get_rank() + 2) % 4]
        found = local.restore(steps[-1], lambda _: {shard(rank) for rank in wanted})
        assert (found / "state.json").is_file() and (found / f"rng_{dist.get_rank():05d}.safetensors").is_file()
        right = torch.full((4,), float(steps[-1])).numpy().tobytes()
        return steps, [rank for rank in wanted if right in (found / shard(rank)).read_bytes()]
    except UserError as error:
        return steps, error.what
    finally:
        local.close()
