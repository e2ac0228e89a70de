"""Measure the bandwidth to other nodes: short all-reduces within groups of nodes, with gloo or NCCL.

In: groups with this node's rank in each. Out: for every group the bus bandwidth in GB/s (10^9 bytes), 2 (n - 1) / n
times the bytes over the seconds of the best of several (the definition of NVIDIA's nccl-tests), or the error.

One process per GPU (one on a CPU) measures all groups one after the other. If it fails or hangs, it is killed and a new
process measures the remaining groups. Only the nodes of a group wait for each other, so a fault affects only them.
"""

import datetime
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from typing import IO, Any, Literal

from megamm.common import addresses, processes

STARTUP, LIMIT = 90.0, 60.0
"""Time limit in seconds for the first group of a new process, and for every further group."""
BYTES = {"gloo": 2**22, "nccl": 2**28}
SECONDS = 0.3
"""Approximate seconds that a group is measured, in 3 to 20 repetitions."""


@dataclass(frozen=True)
class ExchangeGroup:
    """Some nodes of the job; rank: rank of this node's first process among the `world` processes."""

    name: str
    rank: int
    world: int


@dataclass(frozen=True)
class ExchangeJob:
    """Work of each process of a node; host, port: address of the store where the processes meet."""

    host: str
    port: int
    backend: Literal["gloo", "nccl"]
    processes: int
    groups: tuple[ExchangeGroup, ...]


@dataclass(frozen=True)
class Exchange:
    """Result of one group; bandwidth in GB/s, None if it failed: then why, and whether another node caused it."""

    bandwidth: float | None
    why: str = ""
    of_another: bool = False


def measure(job: ExchangeJob, store: Any) -> dict[str, Exchange]:
    """Measure this node's bandwidth by group; store: reports failures to the other nodes."""
    found: dict[str, Exchange] = {}
    while len(found) < len(job.groups):
        # After a failure the rest is measured by new processes: the old ones may hang in a collective.
        rest = ExchangeJob(job.host, job.port, job.backend, job.processes, job.groups[len(found) :])
        workers = _Workers(rest)
        limit = STARTUP
        try:
            for group in rest.groups:
                found[group.name] = workers.wait(group.name, store, time.monotonic() + limit)
                limit = LIMIT
                if found[group.name].bandwidth is None:
                    break
        finally:
            workers.end()
    return found


class _Workers:
    """The processes of this node; threads put the lines that they print into a queue."""

    def __init__(self, job: ExchangeJob) -> None:
        self.lines: queue.Queue[tuple[int, str]] = queue.Queue()
        self.errors: list[IO[str]] = []
        self.processes = []
        for index in range(job.processes):
            self.errors.append(tempfile.TemporaryFile("w+"))  # noqa: SIM115  closed by `end`
            env = os.environ | {"LOCAL_RANK": str(index)}
            interface = "lo" if addresses.is_local(job.host) else addresses.gloo_interface(job.host)
            if interface is not None:
                env.setdefault("GLOO_SOCKET_IFNAME", interface)
            process = processes.start_module(
                __name__,
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors[-1],
                text=True,
            )
            assert process.stdin is not None
            process.stdin.write(json.dumps(asdict(job) | {"index": index}))
            process.stdin.close()
            threading.Thread(target=self._read, args=(index, process.stdout), daemon=True).start()
            self.processes.append(process)

    def _read(self, index: int, out: IO[str]) -> None:
        for line in out:
            self.lines.put((index, line))
        self.lines.put((index, ""))  # the process has exited

    def wait(self, name: str, store: Any, deadline: float) -> Exchange:
        """Wait until all processes finished this group, one failed, or another node reported a failure."""
        speeds: list[float] = []
        while len(speeds) < len(self.processes):
            try:
                index, line = self.lines.get(timeout=0.1)
            except queue.Empty:
                if store.check([f"broken/{name}"]):
                    return Exchange(None, store.get(f"broken/{name}").decode(), of_another=True)
                if time.monotonic() > deadline:
                    return self._broken(name, store, "timed out")
                continue
            if not line:
                return self._broken(name, store, self._last_words(index))
            speeds.append(json.loads(line))
        return Exchange(min(speeds))

    def _broken(self, name: str, store: Any, why: str) -> Exchange:
        if store.check([f"broken/{name}"]):  # a failure on the other node causes the failure here
            return Exchange(None, store.get(f"broken/{name}").decode(), of_another=True)
        store.set(f"broken/{name}", why)
        return Exchange(None, why)

    def _last_words(self, index: int) -> str:
        self.errors[index].seek(0)
        return (self.errors[index].read().strip().splitlines() or ["exited without an error message"])[-1][:200]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
        for process, errors in zip(self.processes, self.errors, strict=True):
            process.wait()
            errors.close()


def main() -> None:
    """Run one process: print a line with the bandwidth of every group."""
    import torch.distributed as dist

    from megamm.common import device

    job = json.load(sys.stdin)
    chosen = device.choose("gpu" if job["backend"] == "nccl" else "cpu")
    timeout = datetime.timedelta(seconds=STARTUP)
    store = dist.TCPStore(job["host"], job["port"], is_master=False, timeout=timeout)
    for group in job["groups"]:
        dist.init_process_group(
            job["backend"],
            store=dist.PrefixStore(group["name"], store),
            rank=group["rank"] + job["index"],
            world_size=group["world"],
            timeout=timeout,
        )
        print(json.dumps(_bus_bandwidth(chosen, BYTES[job["backend"]], group["world"])), flush=True)
        dist.destroy_process_group()


def _bus_bandwidth(device: Any, size: int, world: int) -> float:
    import torch
    import torch.distributed as dist

    # The first all-reduce opens the connections and is not measured; its sum is checked: 1 + 2 + ... + world.
    tensor = torch.full((size // 4,), dist.get_rank() + 1.0, device=device.torch_device)
    dist.all_reduce(tensor)
    if not bool((tensor == world * (world + 1) / 2).all()):
        raise RuntimeError("an all-reduce gave a wrong sum")

    def once() -> float:
        dist.barrier()
        device.synchronize()
        begin = time.perf_counter()
        dist.all_reduce(tensor.zero_())
        device.synchronize()
        return time.perf_counter() - begin

    # All processes must repeat equally often: the slowest one decides how often.
    slowest = torch.tensor(once(), device=device.torch_device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    times = min(max(int(SECONDS / slowest.item()), 3), 20)
    return 2 * (world - 1) / world * size / min(once() for _ in range(times)) / 1e9


if __name__ == "__main__":
    main()
