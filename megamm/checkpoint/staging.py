"""Shared memory into which a rank copies its state, and from which its writer writes the file (rank_file.py).

Without local storage a rank has one staged file, in anonymous memory. With local storage (storage/local_files.py) it
has `LocalStorage.copies` of them: files there, used in turn. A step's part in local storage is the staged file itself,
so a save there needs no further copy. That part is invalidated before the file is reused for another step.
"""

import mmap
import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megamm.checkpoint.rank_file import RankFile
from megamm.checkpoint.storage import local_files
from megamm.checkpoint.tensor_shards import TensorShard
from megamm.common.device import Device
from megamm.common.errors import UserError

if TYPE_CHECKING:
    from megamm.checkpoint.storage.local import LocalStorage

CHUNK = 4 << 20
"""Bytes; larger shards are split, so that threads get equal shares."""
THREADS = 4
"""Maximum number of threads; more do not copy faster, because memory bandwidth is the limit."""


class StagedFile:
    """One rank's file in memory.

    step: step of the state in it, -1 for none. is_saved_locally: whether its part in local storage is valid.
    """

    def __init__(self, layout: RankFile, device: Device, path: Path | None = None) -> None:
        """path: its file; without it, the memory is freed when the rank and its writer have exited.

        OSError if there is not enough space.
        """
        self.layout, self.device, self.path = layout, device, path
        self.step, self.is_saved_locally = -1, False
        self.size = max(layout.size, mmap.PAGESIZE)
        if path is None:
            self.descriptor = os.memfd_create("megamm-checkpoint", os.MFD_CLOEXEC)
            os.ftruncate(self.descriptor, self.size)
        else:
            self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            # Allocate all of it now: a page without space would later end the process with SIGBUS.
            os.posix_fallocate(self.descriptor, 0, self.size)
        # Map all pages now: at the first save each page fault would interrupt the copy.
        self.memory = mmap.mmap(self.descriptor, self.size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        layout.lay_out(memoryview(self.memory))
        self.bytes = torch.frombuffer(self.memory, dtype=torch.uint8)
        self.is_pinned = device.pin_memory(self.bytes)
        # A GPU copies without CPU threads; ranks on one machine share the cores.
        cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.threads = 1 if device.is_gpu else max(1, min(THREADS, cores))
        self.pool = ThreadPoolExecutor(self.threads) if self.threads > 1 else None

    def copy(self, shards: Sequence[TensorShard], steady: bool) -> None:
        """Copy the elements of the steady shards, or of the others; on return these shards may be changed."""
        shares: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = [([], []) for _ in range(self.threads)]
        loads = [0] * self.threads
        for at in (at for at in self.layout.offsets if shards[at.shard].steady == steady):
            data = shards[at.shard].data.detach().view(-1)
            target = self.bytes[at.start : at.start + data.nbytes].view(data.dtype)
            step = CHUNK // data.itemsize
            for a in range(0, len(data), step):
                # The next chunk goes to the thread with the fewest bytes so far.
                least = loads.index(min(loads))
                shares[least][0].append(target[a : a + step])
                shares[least][1].append(data[a : a + step])
                loads[least] += min(step, len(data) - a) * data.itemsize
        full = [share for share in shares if share[0]]
        # One call copies a whole share and releases Python's lock meanwhile, so that the threads copy at the same time.
        if self.pool is None:
            for share in full:
                torch._foreach_copy_(*share, non_blocking=self.device.is_gpu)
        else:
            list(self.pool.map(lambda share: torch._foreach_copy_(*share), full))
        self.device.synchronize()

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown()
        if self.is_pinned:
            self.device.unpin_memory(self.bytes)
        os.close(self.descriptor)


class StagedFiles:
    """The staged files of one rank; each is created when it is first needed."""

    def __init__(self, layout: RankFile, device: Device, local: "LocalStorage | None", rank: int) -> None:
        self.layout, self.device, self.local, self.rank = layout, device, local, rank
        self.all: list[StagedFile] = []
        self.all.append(self._make())

    def _make(self) -> StagedFile:
        if self.local is None:
            return StagedFile(self.layout, self.device)
        path = self.local.root / local_files.STAGED / f"{self.rank}_{len(self.all)}"
        try:
            return StagedFile(self.layout, self.device, path)
        except OSError as error:
            what = f"checkpoint.local: {error}; this rank needs {self.local.copies} times {self.layout.size:,} bytes"
            remedy = "free space there, or remove checkpoint.local from the config"
            raise UserError(what, where=self.local.root, remedy=remedy) from None

    @property
    def saved_locally(self) -> int:
        """The newest step that this rank has in local storage; -1 for none."""
        return max((staged.step for staged in self.all if staged.is_saved_locally), default=-1)

    def take(
        self, needed: Collection[int], in_use: Callable[[], list[StagedFile]], wait: Callable[[], None]
    ) -> StagedFile:
        """Return a staged file to fill: that of the oldest step that is neither needed nor being read.

        needed: steps; in_use: returns the files that the writer may be reading; wait: called until a file is free.
        """
        if self.local is not None and all(f.step >= 0 for f in self.all) and len(self.all) < self.local.copies:
            self.all.append(self._make())
        while not (free := [f for f in self.all if f not in in_use() and (f.step < 0 or f.step not in needed)]):
            wait()
        # Files whose save failed (a step, but no valid part) come before those with a valid part.
        oldest = min(free, key=lambda staged: (staged.is_saved_locally, staged.step))
        if self.local is not None and oldest.step >= 0:
            local_files.retire(self.local.root, oldest.step, self.rank)
        oldest.step, oldest.is_saved_locally = -1, False
        return oldest

    def close(self) -> None:
        """Close them; those that are files stay."""
        for staged in self.all:
            staged.close()
