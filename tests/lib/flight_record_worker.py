"""Three gloo ranks, of which one has not started a collective: the code of each rank (parity/worlds.py)."""

import torch
import torch.distributed as dist

from megamm.elastic import flight_record


def _without_the_first() -> flight_record.Record:
    """Return this rank's record once it says that the first sum has ended: gloo tells the waiting rank first."""
    while True:
        record = flight_record.of_this_rank()
        if not any(operation.number == 1 for group in record for operation in group.waiting):
            return record


def late_rank(_: None) -> flight_record.Record:
    """Return this rank's record at the moment when rank 2 has not started the second sum of the world."""
    pair = dist.new_group([0, 2], group_desc="PAIR")
    store = dist.distributed_c10d._get_default_store()
    dist.all_reduce(torch.ones(3))
    rank = dist.get_rank()
    if rank < 2:
        work = dist.all_reduce(torch.ones(5), async_op=True)
        record = _without_the_first()
        store.set(f"recorded {rank}", "")
        work.wait()
    else:
        store.wait(["recorded 0", "recorded 1"])
        record = _without_the_first()
        dist.all_reduce(torch.ones(5))
    if rank != 1:
        dist.all_reduce(torch.ones(2), group=pair)
    dist.barrier()
    return record
