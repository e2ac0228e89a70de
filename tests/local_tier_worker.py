"""One rank of a job of four on two nodes (folders n0 and n1): writes to the local tier and finds it again.

    RANK=… WORLD_SIZE=4 MASTER_ADDR=… MASTER_PORT=… NODE=n0 python tests/local_tier_worker.py FOLDER

A `LocalTier` made anew is another attempt of the job; a lost node is a folder removed. Rank 0 writes results.json:
scenario -> what every rank saw.
"""

import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch.distributed as dist
from checkpoint_folders import make_checkpoint

from megamm.errors import UserError
from megamm.tiers import parts
from megamm.tiers.choose import choose
from megamm.tiers.durable import DurableTier
from megamm.tiers.local import LocalTier
from megamm.tiers.manifest import Entry

FOLDER = Path(sys.argv[1])
SCENARIOS = {}


def scenario(function):
    SCENARIOS[function.__name__] = function
    return function


def rank():
    return dist.get_rank()


def shard(of_rank):
    return f"tensors/__{of_rank}_0.distcp"


def data_of(step, of_rank):
    """Any bytes, the same wherever they are asked for; of odd and unequal sizes."""
    block = hashlib.sha256(f"{step} {of_rank}".encode()).digest()
    return block * (1000 * of_rank + 3) + block[:5]


def tier(name, replicate=True):
    """A job's start on the two nodes."""
    return LocalTier(FOLDER / name / "$NODE", FOLDER / name / "run", replicate)


def write(local, step, skip=()):
    """What a writer does at a save."""
    if rank() in skip:
        return
    folder = parts.begin(local.root, step, rank())
    files = {shard(rank()): data_of(step, rank()), f"rng_{rank():05d}.safetensors": b"rng %d" % rank()}
    if rank() == 0:
        files |= {"state.json": json.dumps({"step": step}).encode(), "tensors/.metadata": b"index"}
    entries = {}
    for file, data in files.items():
        (folder / file).write_bytes(data)
        entries[file] = Entry(len(data), hashlib.sha256(data).hexdigest())
    parts.commit(folder, parts.Part(rank(), dist.get_world_size(), local.save_id, local.node, entries))


def settle(local, steps, replicated=True):
    """Wait until this node has just these steps, with the other node's parts if they are replicated."""
    end = time.monotonic() + 60
    want = 4 if replicated else 2

    def seen():
        return [(s, len(parts.parts_in(local.root / f"step_{s:08d}"))) for s in parts.steps_in(local.root)]

    while seen() != [(s, want) for s in steps]:
        assert time.monotonic() < end, seen()
        time.sleep(0.02)


def attempt(name, steps, replicate=True, skip_last=(), waits_for=None):
    """A job that saves these steps and ends."""
    local = tier(name, replicate)
    local.begin(None)
    for step in steps[:-1]:
        write(local, step)
    if waits_for is None and not skip_last:
        write(local, steps[-1])
        settle(local, steps[-2:], replicate)
    else:
        settle(local, waits_for, replicate)
        dist.barrier()
        write(local, steps[-1], skip_last)
    dist.barrier()
    local.close()
    dist.barrier()


def restored(local, step, wants):
    """Restore, and what of the wanted shards is there with the right contents."""
    folder = local.restore(step, lambda _: {shard(r) for r in wants})
    have = [r for r in wants if (folder / shard(r)).read_bytes() == data_of(step, r)]
    assert json.loads((folder / "state.json").read_text()) == {"step": step}
    assert (folder / f"rng_{rank():05d}.safetensors").read_bytes() == b"rng %d" % rank()
    return have


def damage(name, node, step, file):
    """Flip a bit of a node's copy."""
    if rank() == 0:
        (path,) = (FOLDER / name / node).glob(f"*/step_{step:08d}/{file}")
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    dist.barrier()


def lose(name, node):
    if rank() == 0:
        shutil.rmtree(FOLDER / name / node)
    dist.barrier()


@scenario
def old_steps_go_and_the_newest_is_found():
    attempt("a", [1, 2, 3, 4, 5])
    local = tier("a")
    seen = local.steps(), restored(local, 5, [rank()])
    local.close()
    return seen


@scenario
def a_damaged_copy_is_replaced_by_the_replica():
    damage("a", "n0", 5, shard(0))
    local = tier("a")
    seen = local.steps(), restored(local, 5, [0, rank()])
    local.close()
    return seen


@scenario
def a_lost_node_gets_its_files_from_its_peer():
    lose("a", "n1")
    local = tier("a")
    seen = local.steps(), restored(local, 5, [rank()])
    local.close()
    return seen


@scenario
def a_changed_layout_gets_what_it_needs():
    local = tier("a")
    local.steps()
    other = (rank() + 2) % 4
    seen = restored(local, 4, [other, rank()]) == [other, rank()]
    local.close()
    return seen


@scenario
def what_no_node_has_whole_is_passed_over():
    for node in ("n0", "n1"):
        damage("a", node, 5, shard(2))
    local = tier("a")
    choice = choose(FOLDER / "a" / "run", local=local, needed=lambda _: {shard(rank())})
    seen = choice.step, choice.tier, (choice.folder / shard(rank())).read_bytes() == data_of(4, rank())
    local.begin(choice.step)
    after = parts.steps_in(local.root)
    local.close()
    return *seen, after


@scenario
def without_replicas_a_lost_node_is_lost():
    attempt("b", [1, 2], replicate=False)
    before = tier("b", replicate=False)
    found = before.steps()
    before.close()
    lose("b", "n1")
    local = tier("b", replicate=False)
    seen = found, local.steps()
    local.close()
    return seen


@scenario
def a_step_that_lacks_one_rank_does_not_count():
    attempt("c", [1, 2, 3], skip_last=(3,), waits_for=[1, 2])
    local = tier("c")
    seen = local.steps()
    local.close()
    return seen


@scenario
def another_runs_steps_do_not_count():
    if rank() == 0:
        (FOLDER / "c" / "run" / "run_id").unlink()
    dist.barrier()
    local = tier("c")
    seen = local.steps()
    local.close()
    return seen


@scenario
def the_newest_over_all_tiers_is_chosen():
    """Local has 2, the run 2 and 3 (damaged), the durable tier 2 and 3; then only what is far away."""
    attempt("d", [1, 2])
    run, url = FOLDER / "d" / "run", f"file://{FOLDER}/d/durable"
    if rank() == 0:
        for step in (2, 3):
            DurableTier(url).upload(make_checkpoint(run, step), FOLDER / "d" / "journal")
    dist.barrier()
    seen = []

    def look(url):
        local = tier("d")
        choice = choose(run, url, local, lambda _: {shard(rank())})
        seen.append((choice.step, choice.tier, choice.folder.name))
        local.close()
        dist.barrier()

    look(url)
    if rank() == 0:
        (run / "checkpoints" / "step_00000003" / shard(1)).write_bytes(b"damaged")
    dist.barrier()
    look(url)
    if rank() == 0:
        shutil.rmtree(run / "checkpoints")
        shutil.rmtree(FOLDER / "d" / "durable" / "step_00000003")
    dist.barrier()
    look(url)
    lose("d", "n0")
    lose("d", "n1")
    look(url)
    return seen


@scenario
def a_durable_tier_out_of_reach():
    """With a checkpoint at hand it is left out; without one, starting anew would be wrong."""
    run, url = FOLDER / "e" / "run", "s3://no-such-bucket/x"
    if rank() == 0:
        make_checkpoint(run, 1)
    dist.barrier()
    first = choose(run, url).tier
    if rank() == 0:
        shutil.rmtree(run / "checkpoints")
    dist.barrier()
    try:
        choose(run, url)
    except UserError as error:
        return first, error.what.split(":")[0]
    return first, ""


def main():
    dist.init_process_group("gloo")
    results = {}
    for name, function in SCENARIOS.items():
        seen = [None] * dist.get_world_size()
        dist.all_gather_object(seen, function())
        results[name] = seen
    if rank() == 0:
        (FOLDER / "results.json").write_text(json.dumps(results))
    dist.barrier()


if __name__ == "__main__":
    os.environ.setdefault("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    main()
