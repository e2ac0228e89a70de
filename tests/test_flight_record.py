"""Which rank a hang waits for, by torch's flight recorder: real records of gloo, and records in NCCL's form."""

import os
import select
import subprocess
import sys
from typing import Any

import pytest
from flight_record_worker import late_rank

from megamm.elastic import flight_record, hang_detector
from megamm.elastic.flight_record import GroupRecord, Operation
from megamm.parity.worlds import WorldFailure, Worlds


def entry(group: str, number: int, name: str, state: str, **others: Any) -> dict[str, Any]:
    """Return an entry as torch 2.13 writes it (FlightRecorder.hpp), without the fields that are not read."""
    known = {"process_group": [group, f"GROUP {group}"], "profiling_name": f"nccl:{name}", "state": state}
    known |= {"collective_seq_id": number, "p2p_seq_id": 0, "is_p2p": False, "retired": state == "completed"}
    return known | {"record_id": number} | others


def test_a_trace_of_nccl_becomes_a_record() -> None:
    trace = {
        "version": "2.10",
        "entries": [
            entry("3", 11, "_all_gather_base", "completed"),
            entry("3", 12, "_reduce_scatter_base", "completed", retired=False),
            entry("3", 13, "_all_gather_base", "started"),
            entry("3", 14, "_reduce_scatter_base", "scheduled"),
            entry("5", 7, "recv 1<-0", "started", is_p2p=True, p2p_seq_id=2, record_id=20),
        ],
    }
    assert flight_record.from_trace(trace, {"3": (4, 5, 6, 7), "5": (1, 5)}) == [
        GroupRecord(
            *("3", "GROUP 3", (4, 5, 6, 7), 14),
            (Operation(13, "_all_gather_base", True), Operation(14, "_reduce_scatter_base", False)),
        ),
        GroupRecord("5", "GROUP 5", (1, 5), 0, (Operation(2, "recv 1<-0", True, peer=1),)),
    ]


def in_group(group: str, ranks: tuple[int, ...], started: int, *waiting: int, **of: Any) -> GroupRecord:
    operations = tuple(
        Operation(number, "all_reduce", of.get("is_started", True), of.get("peer")) for number in waiting
    )
    return GroupRecord(group, "", ranks, started, operations)


ALL, PAIR = ("world", (0, 1, 2)), ("pair", (0, 1))


@pytest.mark.parametrize(
    ("records", "guilty"),
    [
        # Rank 2 has not started the sum that the others wait in.
        ({0: [in_group(*ALL, 5, 5)], 1: [in_group(*ALL, 5, 5)], 2: [in_group(*ALL, 4)]}, [2]),
        # Rank 2 waits for rank 1, which waits for rank 0 in another group.
        ({0: [in_group(*PAIR, 1)], 1: [in_group(*PAIR, 2, 2)], 2: [in_group(*ALL, 1, 1)]}, [0]),
        # All have called it; the device of rank 1 has not come to it.
        ({0: [in_group(*PAIR, 2, 2)], 1: [in_group(*PAIR, 2, 2, is_started=False)]}, [1]),
        # A pipeline: rank 1 receives from rank 0.
        ({0: [], 1: [in_group(*PAIR, 0, 1, peer=0)]}, [0]),
        # Ranks 0 and 1 have started their collectives in different orders.
        ({0: [in_group("a", (0, 1), 1, 1)], 1: [in_group("b", (0, 1), 1, 1)]}, [0, 1]),
        # Ranks of another node.
        ({0: [in_group(*ALL, 5, 5)], 1: [in_group(*ALL, 5, 5)]}, []),
        ({1: [in_group(*PAIR, 0, 1, peer=0)]}, []),
        # Rank 0 waits for another node and rank 1 for rank 2, which waits for no rank.
        ({0: [in_group("far", (0, 9), 1, 1)], 1: [in_group(*ALL, 1, 1)], 2: []}, [2]),
        # Rank 0 waits for another node, whose ranks may wait for rank 1.
        ({0: [in_group("far", (0, 9), 1, 1)], 1: [in_group("near", (1, 9), 4)]}, [1]),
        # No rank waits, or no rank of a collective is late: the records do not tell.
        ({0: [in_group(*ALL, 5)], 1: [in_group(*ALL, 5)]}, None),
        ({0: [in_group(*PAIR, 2, 2)], 1: [in_group(*PAIR, 2, 2)]}, None),
        ({}, None),
    ],
)
def test_the_rank_that_all_wait_for(records: dict[int, Any], guilty: list[int] | None) -> None:
    assert flight_record.culprits(records) == guilty


def test_real_ranks_name_the_one_that_has_not_come(worlds: Worlds) -> None:
    records = worlds.run(3, late_rank, None, timeout=120)
    assert not isinstance(records, WorldFailure), records.lines()
    assert flight_record.culprits(dict(enumerate(records))) == [2]
    assert [flight_record.waits_in(record) for record in records] == [
        "all_reduce (number 2 of group default_pg)",
        "all_reduce (number 2 of group default_pg)",
        None,
    ]
    assert records[0][0].ranks == (0, 1, 2)


def report(rank: int, record: flight_record.Record, called: str | None) -> hang_detector.HangReport:
    frame = "megamm/mcore/optimizer.py:59 norm"
    return hang_detector.HangReport(rank, 5, "step", 9.0, "S", called, frame, is_on_gpu=True, record=record)


def test_on_a_gpu_the_record_decides_and_not_the_stack() -> None:
    """Ranks 0 and 1 wait for a result outside of torch.distributed; rank 2 is in a barrier of its node only."""
    records = {0: [in_group(*ALL, 5, 5)], 1: [in_group(*ALL, 5, 5)], 2: [in_group(*ALL, 4)]}
    reports = [report(rank, record, None if rank < 2 else "barrier") for rank, record in records.items()]
    assert hang_detector.culprits(reports) == [2]
    assert reports[0].to_json()["recorded"] == "all_reduce (number 5 of group world)"


RANK = """
import ctypes, os, sys
from megamm.elastic import flight_record
flight_record.serve(int(sys.argv[1]))
print("ready", flush=True)
library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
library.pthread_mutex_lock(mutex)
library.pthread_mutex_lock(mutex)  # waits for ever: outside of Python, without its lock, as a wait for the device
"""


def test_a_rank_answers_while_its_main_thread_waits_outside_of_python() -> None:
    answers, answer = os.pipe()
    command = [sys.executable, "-c", RANK, str(answer)]
    with subprocess.Popen(command, pass_fds=[answer], stdout=subprocess.PIPE, text=True) as rank:
        assert rank.stdout is not None and rank.stdout.readline() == "ready\n"
        os.kill(rank.pid, flight_record.RECORD_SIGNAL)
        assert select.select([answers], [], [], 60)[0]
        text = os.read(answers, 1 << 16).decode()
        rank.kill()
    os.close(answers)
    os.close(answer)
    assert flight_record.read(text) == []
    assert flight_record.read(text[:-1]) is None
    assert flight_record.read("a stack\n") is None
