"""The collectives that a rank waits in, as torch's flight recorder knows them, for the report of a hang.

On a GPU a rank does not wait inside a collective's function but wherever it first needs a result, so its stack does not
tell which collective that is, or whether it has been started at all. The recorder numbers the collectives of each
process group. A rank that waits in one waits for the members of the group that have not started theirs of this number.

`serve` answers RECORD_SIGNAL in a rank: a thread, which the signal wakes even while the main thread waits for the
device, appends one line of JSON to the file of the rank's stacks. The agent reads it with `read` (hang_detector.py).
torch records the last 2,000 operations by default (TORCH_FR_BUFFER_SIZE). Source: torch/distributed/flight_recorder,
whose names of fields and states these are.
"""

import json
import os
import re
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

RECORD_SIGNAL = signal.SIGRTMIN + 4
"""Makes a rank write its record."""
_MARK = "collectives: "
_PEER = re.compile(r" \d+(?:->|<-)(\d+)$")
"""In a point-to-point operation's name, the peer's rank in the group: "send 0->1"."""
_KEPT = 3
"""Number of operations of a group that a record lists, the oldest first."""


@dataclass(frozen=True)
class Operation:
    """An operation that is not complete. number: of the group's collectives; peer: rank, of a point-to-point one."""

    number: int
    name: str
    is_started: bool
    peer: int | None = None


@dataclass(frozen=True)
class GroupRecord:
    """What a rank did in one process group. started: number of its last collective; waiting: the oldest first."""

    group: str
    description: str
    ranks: tuple[int, ...]
    started: int
    waiting: tuple[Operation, ...]


Record = Sequence[GroupRecord]
"""A rank's record."""


def serve(dump: int) -> None:
    """Answer RECORD_SIGNAL from now on, in this file; call it in the main thread."""
    wakes, wake = os.pipe()
    os.set_blocking(wake, False)
    # The handler itself runs only when the main thread is back in Python. The interpreter writes to `wake` at once.
    signal.signal(RECORD_SIGNAL, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    threading.Thread(target=_answer, args=(wakes, dump), daemon=True, name="flight record").start()


def _answer(wakes: int, dump: int) -> None:
    while numbers := os.read(wakes, 64):
        if RECORD_SIGNAL in numbers:
            record = [asdict(group) for group in of_this_rank()]
            os.write(dump, f"\n{_MARK}{json.dumps(record)}\n".encode())


def of_this_rank() -> Record:
    """Return this process's record; empty before it has joined a job."""
    dist: Any = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_initialized():
        return []
    library: Any = sys.modules["torch._C._distributed_c10d"]
    # Two recorders of the same format: that of the GPU's library exists only in its builds of torch.
    name = "_dump_nccl_trace_json" if "nccl" in dist.get_backend() else "_dump_fr_trace_json"
    trace = json.loads(getattr(library, name)(True, False))
    world = dist.distributed_c10d._world  # maps each group to its name, and to its ranks in the job and in the group
    members = {}
    for group, its in list(world.pg_names.items()):
        ranks = world.pg_group_ranks[group]
        members[its] = tuple(sorted(ranks, key=ranks.__getitem__))
    return from_trace(trace, members)


def from_trace(trace: Mapping[str, Any], members: Mapping[str, tuple[int, ...]]) -> Record:
    """Return the record of a flight recorder's trace. members: global ranks of each process group, by its name."""
    records = []
    for group, description in dict.fromkeys(tuple(entry["process_group"]) for entry in trace.get("entries", [])):
        entries = [entry for entry in trace["entries"] if entry["process_group"][0] == group]
        ranks = members.get(group, ())
        collectives = [entry["collective_seq_id"] for entry in entries if not entry["is_p2p"]]
        waiting = [entry for entry in entries if not entry["retired"] and entry["state"] != "completed"]
        waiting.sort(key=lambda entry: entry["record_id"])
        operations = tuple(_operation(entry, ranks) for entry in waiting[:_KEPT])
        records.append(GroupRecord(group, description, ranks, max(collectives, default=0), operations))
    return records


def _operation(entry: Mapping[str, Any], ranks: Sequence[int]) -> Operation:
    name = entry["profiling_name"].partition(":")[2]
    found = _PEER.search(name) if entry["is_p2p"] else None
    peer = ranks[int(found[1])] if found and int(found[1]) < len(ranks) else None
    return Operation(
        entry["p2p_seq_id" if entry["is_p2p"] else "collective_seq_id"], name, entry["state"] == "started", peer
    )


def read(text: str) -> Record | None:
    """Return the record in what a rank wrote; None if it has not written a complete one."""
    line, end, _ = text.rpartition(f"\n{_MARK}")[2].partition("\n")
    if f"\n{_MARK}" not in text or not end:
        return None
    return [
        GroupRecord(
            group["group"],
            group["description"],
            tuple(group["ranks"]),
            group["started"],
            tuple(Operation(**operation) for operation in group["waiting"]),
        )
        for group in json.loads(line)
    ]


def waits_in(record: Record) -> str | None:
    """Return an operation that a rank waits in, with its number and group; None if it waits in none."""
    waiting = [(group.waiting[0], group) for group in record if group.waiting]
    if not waiting:
        return None
    operation, group = waiting[0]
    return f"{operation.name} (number {operation.number} of group {group.description or group.group})"


def culprits(records: Mapping[int, Record]) -> list[int] | None:
    """Return the ranks that the others wait for and that wait for no rank themselves.

    records: of the ranks of this node. Empty if the culprit is on another node; None if the records do not tell.
    """
    waits_for = {rank: _waits_for(rank, records) for rank in records}
    awaited = set().union(*waits_for.values()) if waits_for else set()
    here = sorted(rank for rank in awaited if rank in records and not waits_for[rank])
    if here:
        return here
    if awaited - records.keys():
        # Ranks of another node wait too, perhaps for one of this node that has nothing to wait for.
        return [rank for rank, record in records.items() if not any(group.waiting for group in record)]
    # A circle: these ranks have started their collectives in different orders.
    return sorted(awaited) or None


def _waits_for(rank: int, records: Mapping[int, Record]) -> set[int]:
    """Return the ranks that this one waits for, of other nodes only if it waits for none of this node."""
    here: set[int] = set()
    elsewhere: set[int] = set()
    for group in records[rank]:
        if not group.waiting:
            continue
        first = group.waiting[0]
        if first.peer is not None:
            (here if first.peer in records else elsewhere).add(first.peer)
            continue
        known = {other: _of_group(records[other], group.group) for other in group.ranks if other in records}
        late = {other for other, its in known.items() if its is None or its.started < first.number}
        if not late and first.is_started:
            # All have called it, but the devices of some have not come to it yet.
            late = {other for other, its in known.items() if its is not None and _is_behind(its, first.number)}
        here |= late
        elsewhere |= set() if late else set(group.ranks) - known.keys()
    return here or elsewhere


def _of_group(record: Record, group: str) -> GroupRecord | None:
    return next((its for its in record if its.group == group), None)


def _is_behind(record: GroupRecord, number: int) -> bool:
    return any(operation.number == number and not operation.is_started for operation in record.waiting)
